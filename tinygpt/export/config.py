"""What to export: the `export` group of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Within, require

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class ExportParams:
    """Formats to write, and how much held-out text is read to check them."""

    group: ClassVar[str] = "export"

    hf: bool  # a folder for transformers: AutoModelForCausalLM, AutoTokenizer
    gguf: tuple[GGUFType, ...]  # one file for llama.cpp per weight type; [] for none
    check_tokens: Annotated[int, Within("[512, inf)")]  # test (or else val) tokens that each file is checked on

    def __post_init__(self) -> None:
        require((len(set(self.gguf)) == len(self.gguf), f"export.gguf={list(self.gguf)} names a type twice"))
