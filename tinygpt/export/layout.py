"""tinygpt's tensors in the layout of another program.

Every step moves numbers, copies them or adds neutral ones, and changes none. H query heads, G key/value heads,
D head_dim, C n_embd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import TIED

Tensors = dict[str, Tensor]  # by name, such as "blocks.0.attn.q_proj.weight"

QKV = ("q_proj", "k_proj", "v_proj")
NO_SINK = -1e30  # a logit beside those of the keys that takes no probability


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one program wants the tensors: what differs from tinygpt's own state dict."""

    names: Mapping[str, str]  # our module to theirs, {i} stands for the block
    zero_bias: Mapping[str, tuple[str, ...]]  # model.bias -> modules with a bias there: zeros where we have none
    untied: bool = False  # a tied head is written once more
    fused_qkv: bool = False  # q_proj, k_proj and v_proj are one matrix, rows in this order, named like q_proj
    adjacent_rope: bool = False  # rotation pairs stand side by side in a head, not half a head apart
    repeated_kv: bool = False  # knows no GQA: each key/value head is written once per query head that reads it
    transposed: tuple[str, ...] = ()  # modules whose weight is (in, out)
    head_norms: Literal["shared", "stacked", "listed"] = "shared"  # of qk_norm: one, a row a head, a tensor a head
    sinks: bool = False  # attention sinks, which must not be there: as good as none


def apply_layout(tensors: Tensors, config: GPTConfig, layout: Layout, n_ctx: int) -> Tensors:
    """A model's tensors by the names and in the shapes of `layout`, with `n_ctx` positions where they are learned."""
    if layout.untied and TIED not in tensors:
        tensors = tensors | {TIED: tensors["tok_emb.weight"].clone()}
    tensors = _add_zero_biases(tensors, layout.zero_bias.get(config.bias, ()))
    if layout.sinks:
        tensors = tensors | {
            f"blocks.{i}.attn.sinks.weight": torch.full((config.n_head,), NO_SINK) for i in range(config.n_layer)
        }
    if layout.repeated_kv:
        tensors = {name: repeat_kv(name, tensor, config) for name, tensor in tensors.items()}
    if layout.adjacent_rope:
        tensors = {name: pair_rope(name, tensor, config) for name, tensor in tensors.items()}
    if layout.fused_qkv:
        tensors = _fuse_qkv(tensors)
    renamed = {
        rename(name, layout): (tensor.T if _is_transposed(name, layout) else tensor).contiguous()
        for name, tensor in _cut_positions(tensors, n_ctx).items()
    }
    return HEAD_NORMS[layout.head_norms](renamed, config, layout)


def _add_zero_biases(tensors: Tensors, modules: tuple[str, ...]) -> Tensors:
    """Give each of these modules a bias, behind its weight; one that has a bias keeps it."""
    biased: Tensors = {}
    for name, tensor in tensors.items():
        biased[name] = tensor
        if name.endswith(".weight") and leaf(name) in modules:
            bias = name.removesuffix("weight") + "bias"
            biased[bias] = tensors.get(bias, tensor.new_zeros(tensor.size(0)))
    return biased


def _cut_positions(tensors: Tensors, n_ctx: int) -> Tensors:
    return {name: tensor[:n_ctx] if leaf(name) == "pos_emb" else tensor for name, tensor in tensors.items()}


def repeat_kv(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """Write each key/value head H/G times in a row, as GQA reads them.  (G·D, …) -> (H·D, …)"""
    if leaf(name) not in ("k_proj", "v_proj"):
        return tensor
    heads = tensor.unflatten(0, (config.n_kv_head, config.head_dim))
    return heads.repeat_interleave(config.n_head // config.n_kv_head, dim=0).flatten(0, 1)


def pair_rope(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """Reorder the rows of queries and keys: a head's 0 1 2 3 4 5 becomes 0 3 1 4 2 5, pairs (i, i + D/2) adjacent.

    llama.cpp loads rows in the wrong order without a word and computes nonsense from them.
    """
    if leaf(name) not in ("q_proj", "k_proj"):
        return tensor
    return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _fuse_qkv(tensors: Tensors) -> Tensors:
    """Stack queries, keys and values under the name of the queries.  (H·D, …), 2 × (G·D, …) -> ((H + 2G)·D, …)"""
    fused: Tensors = {}
    for name, tensor in tensors.items():
        if leaf(name) == "q_proj":
            fused[name] = torch.cat([tensors[name.replace("q_proj", qkv)] for qkv in QKV])
        elif leaf(name) not in ("k_proj", "v_proj"):
            fused[name] = tensor
    return fused


def _stacked(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    """The norm of queries and keys once for each head, as rows of one tensor.  (D,) -> (H, D) or (G, D)"""
    n_heads = _head_norm_names(config, layout)
    return {
        name: tensor.expand(n_heads[name], -1).contiguous() if name in n_heads else tensor
        for name, tensor in tensors.items()
    }


def _listed(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    """The norm of queries and keys once for each head: "….q_layernorm.norms.0.weight" and so on."""
    n_heads = _head_norm_names(config, layout)
    listed: Tensors = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(".weight")
        copies = [f"{base}.norms.{head}.weight" for head in range(n_heads[name])] if name in n_heads else [name]
        listed |= {copy: tensor.clone() for copy in copies}
    return listed


def _head_norm_names(config: GPTConfig, layout: Layout) -> dict[str, int]:
    """Their name for each norm of queries and keys -> the number of its heads."""
    return {
        rename(f"blocks.{i}.attn.{norm}.weight", layout): n_head
        for i in range(config.n_layer)
        for norm, n_head in (("q_norm", config.n_head), ("k_norm", config.n_kv_head))
    }


HEAD_NORMS = {
    "shared": lambda tensors, config, layout: tensors,
    "stacked": _stacked,
    "listed": _listed,
}


def _is_transposed(name: str, layout: Layout) -> bool:
    return name.endswith(".weight") and leaf(name) in layout.transposed


def rename(name: str, layout: Layout) -> str:
    """Their name of one of our tensors."""
    module, _, kind = name.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.", module)
    if block is None:
        return f"{layout.names[module]}.{kind}"
    template = layout.names["blocks.{i}." + module[block.end() :]]
    return f"{template.format(i=block[1])}.{kind}"


def leaf(name: str) -> str:
    """The module's own name: "blocks.0.attn.q_proj.weight" -> "q_proj"."""
    return name.split(".")[-2:][0]  # a tensor of another program may have no module
