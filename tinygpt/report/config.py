"""What is measured: the `evaluate` group of params.yaml.

How the plots look: the `plot` group of params.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Count, CountOrDerived, Within, require


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """The text, the context, and the samples."""

    group: ClassVar[str] = "evaluate"

    split: Literal["val", "test"]  # which held-out text
    context: CountOrDerived  # tokens that a prediction may look back on, at most: null = model.block_size
    stride: CountOrDerived  # tokens scored by each window: null = context (windows side by side, the fastest)
    prompts: tuple[str, ...]  # of the samples; "" begins a document
    max_new_tokens: Count  # of each sample
    temperature: Annotated[float, Within("[0, inf)")]  # divides the logits; 0 takes the likeliest token
    top_k: Annotated[int, Within("[0, inf)")]  # only the k likeliest tokens; 0 = all
    top_p: Annotated[float, Within("(0, 1]")]  # only the likeliest tokens that together reach this probability
    seed: Annotated[int, Within("[0, 4294967295]")]  # of the samples


@dataclass(frozen=True, kw_only=True)
class PlotParams:
    """How the plots look."""

    group: ClassVar[str] = "plot"

    formats: tuple[Literal["svg", "png"], ...]
    dpi: Annotated[int, Within("[20, 1200]")]  # dots per inch of a PNG
    smooth: Count  # rows of train.csv averaged into one point of the training loss; 1 = as it is

    def __post_init__(self) -> None:
        require((bool(self.formats), "plot.formats must name svg, png or both"))
