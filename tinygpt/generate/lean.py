"""The forward pass of a GPT for tokens of any positions in one go, in few operations: what decoding one token costs.

A token of a small model takes about a millisecond, of which a module call takes five microseconds and each operation
one or two: no module is called that need not be, and no operation made that another can do on the way.

M tokens, C n_embd, V vocab_size, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.generate.products import Product, Products, product, products
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT, Block
from tinygpt.model.layers import MLP, SwiGLUMLP

Step = Callable[[Tensor], Tensor]
# Layer, queries (M, H, D), keys and values (M, G, D) -> what each query read, (M, H·D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class LeanBlock:
    """The parts of one block as functions of (M, …)."""

    attn_norm: Step
    qkv: Products
    qk_norm: Step | None
    out: Product
    mlp_norm: Step | None  # None: the MLP reads what attention reads
    mlp: Step


class LeanGPT:
    """The functions of a model, over its own weights."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.embedding = model.tok_emb.weight.detach()
        self.positions = None if model.pos_emb is None else model.pos_emb.weight.detach()
        first, second = model.rope_sin.chunk(2, -1)
        self.rope = torch.stack((model.rope_cos, torch.cat((-first, second), -1)))  # (2, block_size, D)
        self.blocks = [lean_block(cast(Block, block), config) for block in model.blocks]
        self.norm = lean_norm(model.norm)
        self.lm_head = product(model.lm_head)

    def logits(self, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """What follows each of the M tokens, or those `wanted` by their indices: only they pass the last layer's
        `attend`, which returns what they read alone.  (M,), (M,) int64 -> (M, V) float32
        """
        x = F.embedding(ids, self.embedding)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions)
        rope = None if self.positions is not None else self._rope_at(positions)
        for layer, block in enumerate(self.blocks):
            normed = block.attn_norm(x)
            q, k, v = self._heads(block, normed, rope)
            if wanted is not None and layer == len(self.blocks) - 1:
                x, normed = x[wanted], normed[wanted]
            attended = x + block.out(attend(layer, q, k, v))
            x = attended + block.mlp(normed if block.mlp_norm is None else block.mlp_norm(attended))
        return self.lm_head(self.norm(x)).float().contiguous()

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, (M, 1, D) each."""
        cos, sin = self.rope[:, positions, None]
        return cos, sin

    def _heads(self, block: LeanBlock, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(M, C) -> queries (M, H, D), keys and values (M, G, D)"""
        q, k, v = block.qkv(x)
        qk = torch.cat((q, k), -1).view(len(x), -1, self.head_dim)
        if block.qk_norm is not None:
            qk = block.qk_norm(qk)
        if rope is not None:
            qk = self._turned(qk, rope)
        q, k = qk.split((self.n_head, self.n_kv_head), 1)
        return q, k, v.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Pairs (i, i + D/2) by the angle of the position: each half meets the other one turned.  (M, …, D)"""
        return torch.addcmul(x * rope[0], x.roll(self.head_dim // 2, -1), rope[1])


def lean_block(block: Block, config: GPTConfig) -> LeanBlock:
    """The parts of a block."""
    attn = block.attn
    return LeanBlock(
        attn_norm=lean_norm(block.attn_norm),
        qkv=products(attn.q_proj, attn.k_proj, attn.v_proj),
        qk_norm=lean_qk_norm(attn.q_norm, attn.k_norm, config) if config.qk_norm else None,
        out=product(attn.o_proj),
        mlp_norm=None if block.mlp_norm is None else lean_norm(block.mlp_norm),
        mlp=lean_mlp(block.mlp),
    )


def lean_norm(norm: nn.Module) -> Step:
    """LayerNorm as it is, RMSNorm in four operations where PyTorch's has eight."""
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach()
        return partial(
            F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight.detach(), bias=bias, eps=norm.eps
        )
    assert isinstance(norm, nn.RMSNorm) and norm.eps is not None
    return rms_norm(norm.weight.detach(), norm.eps)


def rms_norm(weight: Tensor, eps: float) -> Step:
    """x / √(mean(x²) + eps) · weight over the last dimension of length C, as x / √(|x|² + C·eps) · √C·weight."""
    size = weight.size(-1)
    scale, floor = weight * math.sqrt(size), weight.new_tensor(math.sqrt(size * eps))
    return lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(floor) * scale


def lean_qk_norm(q_norm: nn.Module, k_norm: nn.Module, config: GPTConfig) -> Step:
    """The norms of queries and keys at once: (M, H + G, D) -> (M, H + G, D)."""
    numbers = ((q_norm, config.n_head), (k_norm, config.n_kv_head))
    weight = torch.cat([cast(Tensor, norm.weight).detach().expand(n, -1) for norm, n in numbers])
    if isinstance(q_norm, nn.RMSNorm):
        return rms_norm(weight, config.norm_eps)
    return lambda x: F.layer_norm(x, (config.head_dim,), eps=config.norm_eps) * weight


def lean_mlp(mlp: nn.Module) -> Step:
    """An MLP."""
    assert isinstance(mlp, MLP | SwiGLUMLP)
    down = product(mlp.down_proj)
    if isinstance(mlp, MLP):
        up, activation = product(mlp.up_proj), mlp.activation
        return lambda x: down(activation(up(x)))
    both = products(mlp.gate_proj, mlp.up_proj)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = both(x)
        return down(F.silu(gate) * up)

    return swiglu
