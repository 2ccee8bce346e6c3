"""What to export: the `export` group of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Within, require

GGUFType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportParams:
    """Formats to write, and how much held-out text is read to check them."""

    group: ClassVar[str] = "export"

    hf: bool  # a folder for transformers: AutoModelForCausalLM, AutoTokenizer
    gguf: tuple[GGUFType, ...]  # one file for llama.cpp per weight type; [] for none
    check_tokens: Annotated[int, Within("[512, inf)")]  # test (or else val) tokens that each file is checked on

    def __post_init__(self) -> None:
        require((len(set(self.gguf)) == len(self.gguf), f"export.gguf={list(self.gguf)} names a type twice"))
