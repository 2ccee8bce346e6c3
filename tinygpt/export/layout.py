"""tinygpt's tensors in the layout of another program: zero biases, repeat, rotate, fuse, transpose, rename.

Every step moves numbers without changing one. H query heads, G key/value heads, D head_dim, C n_embd.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tinygpt.export.family import Layout
from tinygpt.model.config import GPTConfig

Tensors = dict[str, Tensor]  # by name, such as "blocks.0.attn.q_proj.weight"


def apply_layout(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    """A model's tensors by the names and in the shapes of `layout`."""
    tensors = _add_zero_biases(tensors, layout.zero_bias.get(config.bias, ()))
    if layout.repeated_kv:
        tensors = {name: _repeat_kv(name, tensor, config) for name, tensor in tensors.items()}
    if layout.adjacent_rope:
        tensors = {name: _pair_rope(name, tensor, config) for name, tensor in tensors.items()}
    if layout.fused_qkv:
        tensors = _fuse_qkv(tensors)
    return {
        _rename(name, layout): (tensor.T if _is_transposed(name, layout) else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def _add_zero_biases(tensors: Tensors, modules: tuple[str, ...]) -> Tensors:
    """Give each of these modules a bias, behind its weight; one that has a bias keeps it."""
    biased: Tensors = {}
    for name, tensor in tensors.items():
        biased[name] = tensor
        if name.endswith(".weight") and _leaf(name) in modules:
            bias = name.removesuffix("weight") + "bias"
            biased[bias] = tensors.get(bias, tensor.new_zeros(tensor.size(0)))
    return biased


def _repeat_kv(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """Write each key/value head H/G times in a row, as GQA reads them.  (G·D, …) -> (H·D, …)"""
    if _leaf(name) not in ("k_proj", "v_proj"):
        return tensor
    heads = tensor.unflatten(0, (config.n_kv_head, config.head_dim))
    return heads.repeat_interleave(config.n_head // config.n_kv_head, dim=0).flatten(0, 1)


def _pair_rope(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """Reorder the rows of queries and keys: a head's 0 1 2 3 4 5 becomes 0 3 1 4 2 5, pairs (i, i + D/2) adjacent.

    llama.cpp loads rows in the wrong order without a word and computes nonsense from them.
    """
    if _leaf(name) not in ("q_proj", "k_proj"):
        return tensor
    return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _fuse_qkv(tensors: Tensors) -> Tensors:
    """Stack queries, keys and values under the name of the queries.  (H·D, …), 2 × (G·D, …) -> ((H + 2G)·D, …)"""
    fused: Tensors = {}
    for name, tensor in tensors.items():
        if _leaf(name) == "q_proj":
            fused[name] = torch.cat([tensors[name.replace("q_proj", qkv)] for qkv in ("q_proj", "k_proj", "v_proj")])
        elif _leaf(name) not in ("k_proj", "v_proj"):
            fused[name] = tensor
    return fused


def _is_transposed(name: str, layout: Layout) -> bool:
    return name.endswith(".weight") and _leaf(name) in layout.transposed


def _rename(name: str, layout: Layout) -> str:
    module, _, kind = name.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.", module)
    if block is None:
        return f"{layout.names[module]}.{kind}"
    template = layout.names["blocks.{i}." + module[block.end() :]]
    return f"{template.format(i=block[1])}.{kind}"


def _leaf(name: str) -> str:
    """The module's own name: "blocks.0.attn.q_proj.weight" -> "q_proj"."""
    return name.split(".")[-2]
