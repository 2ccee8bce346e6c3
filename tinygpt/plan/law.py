"""How the validation loss of our own recipe falls with weights, tokens and text, in bits per byte.

    loss = difficulty · (A / weights^a + (1 + tokens of a step / batch) / bytes)^b

after Kaplan et al. (https://arxiv.org/abs/2001.08361, equation 1.5). Text that is seen again counts less each time, as
in Muennighoff et al. (https://arxiv.org/abs/2305.16264), and that of a large batch less, too (McCandlish et al.,
https://arxiv.org/abs/1812.06162). `benchmarks/scaling_fit.py` fits the constants on the runs of benchmarks/scaling.csv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a run decides its loss."""

    n_weights: float  # of the blocks' matrices and the head
    n_tokens: float  # seen in training, counted each time
    n_unique: float  # tokens of the training text
    batch_tokens: float  # in one step
    bytes_per_token: float

    @property
    def epochs(self) -> float:
        """How many times the text is seen."""
        return self.n_tokens / self.n_unique


@dataclass(frozen=True, kw_only=True)
class Law:
    """The constants; `loss` is for a text of difficulty 1."""

    weights: float  # A, with weights and bytes in millions
    weights_power: float  # a
    power: float  # b
    repeats: float  # what all epochs after the first count together at most, in epochs
    batch: float  # tokens of a step, of which half count: runs of 1,024 and 2,048 tokens a step showed no loss yet

    def loss(self, size: Size) -> float:
        """Bits per byte of validation text of difficulty 1."""
        again = max(0.0, size.epochs - 1)
        seen = min(size.n_tokens, size.n_unique) + size.n_unique * self.repeats * -math.expm1(-again / self.repeats)
        by_data = (1 + size.batch_tokens / self.batch) / (seen * size.bytes_per_token / 1e6)
        by_weights = self.weights / (size.n_weights / 1e6) ** self.weights_power
        return (by_weights + by_data) ** self.power


LAW = Law(weights=0.2253, weights_power=0.6434, power=0.17828, repeats=0.6498, batch=32_768)  # batch is not fitted
SPREAD = 0.1  # two texts that it was not fitted on were 1 to 5 percent off, a third one a third (docs/plan.md)
