"""What to export: the `export` group of params.yaml."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tinygpt.errors import shown
from tinygpt.export.families import LLAMA_CPP, find_family, refusal
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.params import Within, require

GGUFType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip
MIN_BLOCK_SIZE = 4  # perplexity does not count the first half of a context and one token more


@dataclass(frozen=True, kw_only=True)
class ExportParams:
    """The formats to write, and how much held-out text to check them on."""

    group: ClassVar[str] = "export"

    hf: bool  # a folder for transformers: AutoModelForCausalLM, AutoTokenizer
    gguf: tuple[GGUFType, ...]  # one file for llama.cpp per weight type; [] for none
    check_tokens: Annotated[int, Within("[512, inf)")]  # test (or else val) tokens that each file is checked on

    def __post_init__(self) -> None:
        require((len(set(self.gguf)) == len(self.gguf), f"export.gguf={shown(self.gguf)} names a type twice"))

    def rules_with(self, groups: Mapping[str, Any]) -> Iterable[tuple[bool, str]]:
        """The rules that the model can be exported and checked, if the `model` group is loaded too."""
        if "model" not in groups:
            return
        model = groups["model"]
        targets = [*([TRANSFORMERS] if self.hf else []), *([LLAMA_CPP] if self.gguf else [])]
        if not all(find_family(target.families, model) for target in targets):
            yield False, refusal(targets, model)
        if self.gguf:
            _, n_ctx = find_family(LLAMA_CPP.families, model) or (None, model.block_size)
            key = "block_size" if n_ctx == model.block_size else "window"
            yield (
                n_ctx >= MIN_BLOCK_SIZE,
                f"model.{key}={n_ctx} is too short to check export.gguf: set it to at least {MIN_BLOCK_SIZE}",
            )
