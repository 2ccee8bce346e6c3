"""From the logits of the next token to its id: a list of functions of logits, then a draw.

V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from tinygpt.params import Within

LogitsFilter = Callable[[Tensor], Tensor]  # (V,) -> (V,)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens."""

    temperature: Annotated[float, Within("[0, inf)")] = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: Annotated[int, Within("[0, inf)")] = 0  # only the k likeliest tokens; 0 = all
    top_p: Annotated[float, Within("(0, 1]")] = 1.0  # only the likeliest tokens that together reach this probability
    seed: Annotated[int, Within("[0, 4294967295]")] = 0


def make_filters(sampling: Sampling) -> list[LogitsFilter]:
    """The filters that `sampling` asks for, in the order in which they are applied."""
    filters: list[LogitsFilter] = []
    if sampling.temperature > 0:
        filters.append(lambda logits: (logits - logits.max()) / sampling.temperature)  # the largest stays finite
    if sampling.top_k:
        filters.append(lambda logits: apply_top_k(logits, sampling.top_k))
    if sampling.top_p < 1:
        filters.append(lambda logits: apply_top_p(logits, sampling.top_p))
    return filters


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest (and what equals the smallest of them): k = 2 of [1, 3, 2] -> [-inf, 3, 2]."""
    kth = logits.topk(min(k, logits.numel())).values[-1]
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p, at least one (https://arxiv.org/abs/1904.09751).

    p = 0.7 of probabilities [0.5, 0.3, 0.2] keeps the first two.
    """
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # of all likelier tokens together
    return logits.index_fill(0, order[before >= p], -math.inf)


def make_sampler(sampling: Sampling) -> Callable[[Tensor], int]:
    """A function from logits (V,) to the next id; it draws from its own generator, on the CPU."""
    filters = make_filters(sampling)
    generator = torch.Generator().manual_seed(sampling.seed)

    def sample(logits: Tensor) -> int:
        logits = logits.double().cpu()
        for apply in filters:
            logits = apply(logits)
        if sampling.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(0), 1, generator=generator))

    return sample
