"""Causal self-attention and the two ways to compute it.

B batch, T query length, S key length, H query heads, G key/value heads, D head_dim, C n_embd.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.config import GPTConfig
from tinygpt.model.layers import NORMS, Linear, apply_rope
from tinygpt.model.products import onednn_multiplies

# Where oneDNN multiplies, written-out attention is faster up to this length: fused attention has many small products,
# which oneDNN does not do fast. At 512, both take equally long.
SHORT = 256


def attention_mask(t: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a token may attend: to itself and the window - 1 tokens before it.  -> (T, T) bool

    A window of 2 and T = 3 give [[1, 0, 0], [1, 1, 0], [0, 1, 1]]. None stands for plain causal attention, to all
    tokens before, for which kernels are fastest.
    """
    if window is None or window >= t:
        return None
    return torch.ones(t, t, dtype=torch.bool, device=device).tril().triu(1 - window)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The share of its attention that each query gives to each key.  (B,H,T,D), (B,G,S,D) -> (B,H,T,S)

    `mask` is (T, S) bool, or None for the plain causal case T == S.
    """
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = q / math.sqrt(q.size(-1)) @ repeated(k, q).mT
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


def repeated(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each key/value head for every query head that reads it.  (B, G, S, D) -> (B, H, S, D)"""
    return kv.repeat_interleave(q.size(1) // kv.size(1), dim=1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out, the readable reference.  (B,H,T,D), (B,G,S,D), (B,G,S,D) -> (B,H,T,D)"""
    return attention_weights(q, k, mask) @ repeated(v, q)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same with PyTorch's fused kernels, where they are faster; the fastest need `is_causal` instead of a mask."""
    if onednn_multiplies() and q.size(2) <= SHORT and not torch.is_autocast_enabled("cpu"):
        return explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))


Masks = Mapping[int | None, Tensor | None]  # by window, for one forward pass

ATTENTION = {"explicit": explicit_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    """Multi-head attention of one block; n_kv_head makes it MHA, GQA or MQA."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.window = config.window_of(layer)
        self.head_dim = config.head_dim
        qkv_bias, o_bias = config.bias != "none", config.bias == "all"
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim, bias=qkv_bias)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=qkv_bias)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=qkv_bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=o_bias)
        norm = partial(NORMS[config.norm], config.head_dim, eps=config.norm_eps, bias=False)
        self.q_norm, self.k_norm = (norm(), norm()) if config.qk_norm else (nn.Identity(), nn.Identity())
        self.attend = ATTENTION[config.attention]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, masks: Masks) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        q = self.q_norm(self._heads(self.q_proj(x)))
        k = self.k_norm(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = self.attend(q, k, v, masks[self.window])  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads·D) -> (B, heads, T, D)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
