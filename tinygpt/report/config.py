"""What is measured, and how plots look: the groups `evaluate` and `plot` of params.yaml."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tinygpt.corpus.sources import SOURCES
from tinygpt.params import Count, CountOrDerived, Within, require


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """The text, the context, and the samples."""

    group: ClassVar[str] = "evaluate"

    split: Literal["val", "test"]  # which held-out text
    context: CountOrDerived  # tokens of context for a prediction, at most: null = model.block_size
    stride: CountOrDerived  # tokens scored by each window: null = context (windows side by side, the fastest)
    prompts: tuple[str, ...]  # of the samples; "" begins a document
    held_out_prompts: Annotated[int, Within("[0, 100]")]  # more of them, from that split, with what really followed
    max_new_tokens: Count  # of each sample
    temperature: Annotated[float, Within("[0, inf)")]  # divides the logits; 0 takes the likeliest token
    top_k: Annotated[int, Within("[0, inf)")]  # only the k likeliest tokens; 0 = all
    top_p: Annotated[float, Within("(0, 1]")]  # only the likeliest tokens that together reach this probability
    seed: Annotated[int, Within("[0, 4294967295]")]  # of the samples

    def rules_with(self, groups: Mapping[str, Any]) -> Iterable[tuple[bool, str]]:
        """What must hold between this group and others of params.yaml, by name, if they are loaded too."""
        if "model" in groups:
            block_size = groups["model"].block_size
            context = self.context or block_size
            yield (
                context <= block_size,
                f"evaluate.context={context} must be at most model.block_size={block_size}: set it to null",
            )
            yield (
                (self.stride or 1) <= context,
                f"evaluate.stride={self.stride} must be at most evaluate.context={context}: set it to null",
            )
        if "clean" in groups and groups["clean"].split != "source":
            yield (
                self.split == "val" or groups["clean"].test_fraction > 0,
                "evaluate.split=test, but clean.test_fraction=0 leaves no test text: set evaluate.split=val",
            )
        elif {"clean", "download"} <= groups.keys():
            source = groups["download"].source
            official = SOURCES[source].splits.values() if source in SOURCES else ()
            yield (
                self.split in official or not official,  # the stage clean refuses a source without any
                f"evaluate.split={self.split}, but download.source={source} has no such split of its own: "
                f"set evaluate.split to {' or '.join(split for split in official if split != 'train')}",
            )


@dataclass(frozen=True, kw_only=True)
class PlotParams:
    """How the plots look."""

    group: ClassVar[str] = "plot"

    formats: tuple[Literal["svg", "png"], ...]
    dpi: Annotated[int, Within("[20, 1200]")]  # dots per inch of a PNG
    smooth: Count  # rows of train.csv averaged into one point of the training loss; 1 = as it is

    def __post_init__(self) -> None:
        require((bool(self.formats), "plot.formats must name svg, png or both"))
