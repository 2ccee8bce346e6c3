"""Linear layers with int8 or int4 weights, which replace those of a trained model for generation.

Weights are rounded to the nearest step. Each row (int8) or group of GROUP columns (int4) has a step of its own, as in
Dettmers et al., https://arxiv.org/abs/2208.07339, but outliers are not treated apart. On the CPU, PyTorch's kernels
for such weights multiply in bfloat16. On a GPU, the weights are turned back into floats for each product.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.errors import UserError
from tinygpt.model.gpt import GPT

GROUP = 32  # columns of int4 that share a step: the fewest that the kernel accepts
ROWS = 16  # int4's kernel needs a multiple of this many rows


class Int8Linear(nn.Module):
    """weight ≈ step · q, q in [-127, 127], with a step for each row."""

    q: Tensor
    step: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        step = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (out,)
        self.register_buffer("q", (weight / step[:, None]).round().to(torch.int8))
        self.register_buffer("step", step)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        y = _flat(self._product, x) * self.step
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.q.to(x.dtype))
        ones = torch.ones(len(self.step), dtype=torch.bfloat16)  # forward() scales rows in float32 instead
        return torch._weight_int8pack_mm(x.bfloat16(), self.q, ones).to(x.dtype)


class Int4Linear(nn.Module):
    """weight ≈ step · (q - 8) + middle, q in [0, 15], with a step and a middle for each group of a row."""

    packed: Tensor
    steps: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        groups = weight.unflatten(1, (-1, GROUP))  # (out, in / GROUP, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        step = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16().float()
        middle = (low + 8 * step).bfloat16().float()
        q = ((groups - middle[..., None]) / step[..., None] + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
        self.register_buffer("packed", self._pack(q))
        self.register_buffer("steps", torch.stack([step, middle], -1).transpose(0, 1).contiguous().bfloat16())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        y = _flat(self._product, x)
        return y if self.bias is None else y + self.bias

    def _pack(self, q: Tensor) -> Tensor:
        """(out, in) int32 -> (out, in / 2) bytes, the even columns in the lower four bits"""
        return (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)

    def _product(self, x: Tensor) -> Tensor:
        q = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).unflatten(1, (-1, GROUP))
        step, middle = self.steps.to(x.dtype).transpose(0, 1).unbind(-1)  # (out, in / GROUP) each
        weight = (q.to(x.dtype) - 8) * step[..., None] + middle[..., None]
        return F.linear(x, weight.flatten(1))


class Int4LinearCPU(Int4Linear):
    """The same with the CPU's kernel, which has its own packing."""

    def _pack(self, q: Tensor) -> Tensor:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        return packed

    def _product(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, GROUP, self.steps)
        return torch.as_tensor(y, dtype=x.dtype)


def int4_linear(linear: nn.Linear) -> Int4Linear:
    """The layer for the device that holds the weights; it must stay on that device."""
    return (Int4LinearCPU if linear.weight.device.type == "cpu" else Int4Linear)(linear)


def _flat(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a product of (rows, in) to an x of any number of dimensions."""
    return product(x.reshape(-1, x.size(-1))).reshape(*x.shape[:-1], -1)


QUANTIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": Int8Linear, "int4": int4_linear}


def quantize(model: GPT, kind: str) -> None:
    """Replace all linear layers, the head included.  Raises UserError when the size of one does not fit int4."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        if kind == "int4" and (linear.in_features % GROUP or linear.out_features % ROWS):
            raise UserError(
                f"{name} is ({linear.out_features}, {linear.in_features}), but int4 needs a multiple of {ROWS} rows "
                f"and of {GROUP} columns: use int8"
            )
    for name, linear in linears:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, QUANTIZED[kind](linear))
