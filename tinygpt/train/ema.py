"""An average of the weights (Polyak and Juditsky, https://doi.org/10.1137/0330046), exponential in the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tinygpt.train.config import EMAParams


class EMA:
    """The average of some tensors, of their names and shapes; empty before it begins."""

    def __init__(self, params: EMAParams) -> None:
        self.params = params
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Take in the tensors after `step` steps."""
        if step < self.params.start:
            return
        if not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        names = list(self.average)  # read from a file they have another order
        torch._foreach_lerp_([self.average[n] for n in names], [tensors[n] for n in names], 1 - self.params.decay)

    @contextmanager
    def in_place_of(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """A context in which the tensors hold the average, and the average holds what they held."""
        try:
            _exchange(self.average, tensors)
            yield
        finally:
            _exchange(self.average, tensors)


@torch.no_grad()
def _exchange(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Of equal names; one tensor at a time, as a copy of all would take their memory once more."""
    for name, tensor in some.items():
        kept = tensor.clone()
        tensor.copy_(others[name])
        others[name].copy_(kept)
