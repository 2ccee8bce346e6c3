"""How the plots look: the `plot` group of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Count, Within, require


@dataclass(frozen=True, kw_only=True)
class PlotParams:
    """How the plots look."""

    group: ClassVar[str] = "plot"

    formats: tuple[Literal["svg", "png"], ...]
    dpi: Annotated[int, Within("[20, 1200]")]  # dots per inch of a PNG
    smooth: Count  # rows of train.csv averaged into one point of the training loss; 1 = as it is

    def __post_init__(self) -> None:
        require((bool(self.formats), "plot.formats must name svg, png or both"))
