"""Norms, MLPs and rotary positions: small parts, chosen by name when the model is built. Each kind has one signature.

B batch, T tokens, C n_embd, H heads, D head_dim.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.config import MLPS, GPTConfig

FIRST_ROOM = 4096  # positions that rope's tables and KV caches have room for at first

Activation = Callable[[Tensor], Tensor]  # element by element, of any shape


class Linear(nn.Linear):
    """PyTorch's without initial values: drawing them takes longer than reading a file. init_weights sets others."""

    def reset_parameters(self) -> None:
        """Leave the weights unset."""


class Embedding(nn.Embedding):
    """PyTorch's without initial values, as above."""

    def reset_parameters(self) -> None:
        """Leave the weights unset."""


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension (Zhang and Sennrich, https://arxiv.org/abs/1910.07467); it has no bias.

    PyTorch's, which also accepts shorter floats and computes in its weight's type, as autocast does on a GPU.
    """

    eps: float

    def __init__(self, size: int, *, eps: float, bias: bool) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> (…, size), in the weight's type"""
        return super().forward(x.to(self.weight.dtype))  # PyTorch's warns of unequal types on a CPU


NORMS: dict[str, Callable[..., nn.Module]] = {  # (size, *, eps, bias)
    "layernorm": nn.LayerNorm,  # Ba et al., https://arxiv.org/abs/1607.06450
    "rmsnorm": RMSNorm,
}


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415)."""
    learns_on_cpu = x.requires_grad and x.device.type == "cpu" and x.dtype.itemsize >= 4
    return _SigmoidGELU.apply(x) if learns_on_cpu else F.gelu(x, approximate="tanh")


GELU_A = math.sqrt(8 / math.pi)
GELU_B = GELU_A * 0.044715


class _SigmoidGELU(torch.autograd.Function):
    """The same function as x · σ(u), u = x · (a + b x²), since (1 + tanh(u / 2)) / 2 = σ(u); forward() keeps the slope.

    On a CPU tanh takes three times as long as the sigmoid, and PyTorch's kernel computes it again in the backward pass.
    Floats shorter than float32 would overflow on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape."""
        square = x * x
        gate = (square * GELU_B).add_(GELU_A).mul_(x).sigmoid_()
        slope = square.mul_(3 * GELU_B).add_(GELU_A).mul_(x).mul_(1 - gate).add_(1).mul_(gate)
        ctx.save_for_backward(slope)  # d/dx x σ(u) = σ(u) · (1 + x · u' · (1 - σ(u))), u' = a + 3 b x²
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Any shape."""
        return ctx.saved_tensors[0] * grad


def relu2(x: Tensor) -> Tensor:
    """The square of relu (So et al., https://arxiv.org/abs/2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {"gelu": gelu, "relu2": relu2, "silu": F.silu}


class MLP(nn.Module):
    """down(activation(up(x))), or gated down(activation(gate(x)) · up(x)) (Shazeer, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        kind, bias = MLPS[config.mlp], config.bias == "all"
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=bias) if kind.gated else None
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=bias)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=bias)
        self.activation = ACTIVATIONS[kind.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Rope(nn.Module):
    """Tables of cosines and sines, which grow with the positions in use.  They are made on the CPU, and moved."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        cos, sin = rope_tables(first_room(config.block_size), config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """The tables of the first n positions, each (n, D)."""
        cos, sin = self.cos, self.sin  # other threads may make new ones meanwhile, and leave one of each
        if n > min(len(cos), len(sin)):
            with torch.inference_mode(mode=False):  # training uses them too, even if an evaluation makes them
                room = more_room(n, self.config.block_size)
                tables = rope_tables(room, self.config.head_dim, self.config.rope_theta)
                cos, sin = (table.to(cos) for table in tables)
                self.cos, self.sin = cos, sin
        return cos[:n], sin[:n]


def first_room(block_size: int) -> int:
    """How many positions to make room for at first: all of an ordinary model's."""
    return min(block_size, FIRST_ROOM)


def more_room(n: int, block_size: int) -> int:
    """How many positions to make room for when n are needed: a power of two, so that tables and caches seldom grow."""
    return min(block_size, 1 << (n - 1).bit_length())


def rope_tables(n: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first n positions' angles, each (n, D), computed in float64 on the CPU.

    Pair i of the D/2 pairs turns by theta^(-2i/D) radians per position (Su et al., https://arxiv.org/abs/2104.09864).
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")  # other devices may give other bits
    angles = torch.outer(torch.arange(n, dtype=torch.float64, device="cpu"), theta ** (-pairs / head_dim))
    return angles.cos().float().repeat(1, 2), angles.sin().float().repeat(1, 2)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head, as transformers does.  (B, H, T, D), two of (T, D) -> (B, H, T, D)"""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
