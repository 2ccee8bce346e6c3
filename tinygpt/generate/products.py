"""Products of a few rows with the weights of linear layers, as fast as memory gives the weights.

M rows, I inputs, O outputs, N slices of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.quantize import Int8Linear

FEW = 64  # rows: above it the weights are read seldom enough for the plain product
Product = Callable[[Tensor], Tensor]  # (M, I) -> (M, O)
Products = Callable[[Tensor], Sequence[Tensor]]  # (M, I) -> an (M, O) of each layer


def product(layer: nn.Module) -> Product:
    """What a linear layer computes; its weights may change afterwards."""
    if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu":
        return SlicedProduct(layer)
    return Int8Product([layer]) if isinstance(layer, Int8Linear) else layer


def products(*layers: nn.Module) -> Products:
    """What several linear layers compute of the same input."""
    if all(isinstance(layer, Int8Linear) for layer in layers):  # small enough to be copied for one product
        joined, sizes = Int8Product(layers), [len(layer.step) for layer in layers if isinstance(layer, Int8Linear)]
        return lambda x: joined(x).split(sizes, -1)
    each = [product(layer) for layer in layers]
    return lambda x: [multiply(x) for multiply in each]


class SlicedProduct:
    """x Wᵀ + b, a slice of W's rows for each thread.

    MKL multiplies one row with a matrix on one thread only, but the matrices of a batch on all; and of several rows it
    reads the weights faster when they stand on the left.
    """

    def __init__(self, linear: nn.Linear) -> None:
        n = torch.get_num_threads()
        self.n = n if linear.out_features % n == 0 else 1
        self.whole = linear.weight.detach()  # (O, I)
        self.weight = self.whole.unflatten(0, (self.n, -1))  # (N, O / N, I)
        self.transposed = self.weight.mT
        self.bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O)"""
        if len(x) > FEW:
            return F.linear(x, self.whole, self.bias)
        if len(x) == 1 and torch.compiler.is_compiling():
            y = (self.whole * x).sum(-1)[None]  # becomes a loop that all threads share
        elif len(x) == 1:
            y = torch.bmm(x.expand(self.n, -1, -1), self.transposed).view(1, -1)
        else:
            y = torch.bmm(self.weight, x.mT.expand(self.n, -1, -1)).flatten(0, 1).mT
        return y if self.bias is None else y + self.bias


class Int8Product:
    """What Int8Linear layers compute of the same input, side by side, in few operations."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        found = [layer for layer in layers if isinstance(layer, Int8Linear)]
        biases = [layer.bias for layer in found if layer.bias is not None]
        self.q, self.step = _joined([layer.q for layer in found]), _joined([layer.step for layer in found])
        self.bias = _joined(biases) if biases else None
        self.ones = torch.ones(len(self.step), dtype=torch.bfloat16, device=self.step.device)

    def __call__(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O)"""
        if x.device.type == "cpu" and len(x) <= FEW:
            y = torch._weight_int8pack_mm(x.bfloat16().contiguous(), self.q, self.ones)
        else:
            y = F.linear(x, self.q.to(x.dtype))
        y = (y * self.step).to(x.dtype)
        return y if self.bias is None else y + self.bias


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0].detach()
