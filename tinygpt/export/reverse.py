"""The way back from another program's layout to tinygpt's tensors: each step of layout.py undone, in reverse order.

What was copied there must be equal here, and what was added must be neutral, else the tensors are of another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.layout import QKV, Layout, Tensors, leaf, rename
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import TIED
from tinygpt.model.weights import misshapen, model_tensors, unset_model

KINDS = ("weight", "bias")
MOST_NAMED = 6  # tensors that an error names


class Misfit(UserError):
    """Tensors that are not those of a config; `problems` has all that is missing, too much or of another shape."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = sorted(problems)
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        super().__init__(f"the tensors do not fit their config: {'; '.join(self.problems[:MOST_NAMED])}{more}")


def revert_layout(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    """Tensors in a layout, by our names and in our shapes.  Raises Misfit, or UserError where heads differ."""
    expected = model_tensors(unset_model(config))  # of which nothing but the shapes is read
    tensors = _renamed(_shared_norms(tensors), config, layout)
    tensors = {name: _transposed(name, tensor, layout) for name, tensor in tensors.items()}
    tensors = _split_qkv(tensors, config) if layout.fused_qkv else tensors
    if layout.adjacent_rope:
        tensors = {name: _unpair_rope(name, tensor, config) for name, tensor in tensors.items()}
    if layout.repeated_kv:
        tensors = {name: _unrepeat_kv(name, tensor, config) for name, tensor in tensors.items()}
    tensors = _without_neutral(tensors, expected.keys())
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is too much" for name in tensors.keys() - expected.keys()]
    problems += misshapen(tensors, expected)
    if problems:
        raise Misfit(problems)
    return tensors


def _shared_norms(tensors: Tensors) -> Tensors:
    """One norm of queries or keys where each head has its own and all are equal."""
    shared: Tensors = {}
    for name, tensor in tensors.items():
        base = re.sub(r"\.norms\.\d+\.", ".", name)
        stacked = tensor.ndim == 2 and name.endswith("_norm.weight")
        one = tensor[0] if stacked else tensor
        first = shared.setdefault(base, one)
        if (stacked and not (tensor == one).all()) or not (first is one or torch.equal(first, one)):
            raise UserError(f"{name}: the heads have norms of their own, here they share one")
    return shared


def _renamed(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    modules = {
        module.format(i=i) if "{i}" in module else module for module in layout.names for i in range(config.n_layer)
    }
    ours = {rename(f"{module}.{kind}", layout): f"{module}.{kind}" for module in modules for kind in KINDS}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def _transposed(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    return tensor.T.contiguous() if name.endswith(".weight") and leaf(name) in layout.transposed else tensor


def _split_qkv(tensors: Tensors, config: GPTConfig) -> Tensors:
    split: Tensors = {}
    for name, tensor in tensors.items():
        if leaf(name) == "q_proj":
            n_query = config.n_head * config.head_dim
            n_rest = (len(tensor) - n_query) // 2
            parts = tensor.split([n_query, n_rest, len(tensor) - n_query - n_rest])
            split |= {name.replace("q_proj", qkv): part.contiguous() for qkv, part in zip(QKV, parts, strict=True)}
        else:
            split[name] = tensor
    return split


def _unpair_rope(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """A head's rows 0 3 1 4 2 5 become 0 1 2 3 4 5 again."""
    if leaf(name) not in ("q_proj", "k_proj"):
        return tensor
    return tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _unrepeat_kv(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """(H·D, …) -> (G·D, …), of each group the first."""
    if leaf(name) not in ("k_proj", "v_proj") or config.n_head == config.n_kv_head:
        return tensor
    heads = tensor.unflatten(0, (config.n_kv_head, -1, config.head_dim))
    if not (heads == heads[:, :1]).all():
        raise UserError(f"{name}: the heads of a group differ, so this is no model of n_kv_head={config.n_kv_head}")
    return heads[:, 0].flatten(0, 1).contiguous()


def _without_neutral(tensors: Tensors, expected: Iterable[str]) -> Tensors:
    """Without zero biases, sinks that take nothing and a head that is the embedding, where the model has none."""
    names = set(expected)
    return {name: tensor for name, tensor in tensors.items() if name in names or not _is_neutral(name, tensors)}


def _is_neutral(name: str, tensors: Tensors) -> bool:
    tensor = tensors[name]
    if name == TIED:
        return torch.equal(tensor, tensors.get("tok_emb.weight", tensor[:0]))
    if leaf(name) == "sinks":
        return bool((tensor < -1e29).all())
    return name.endswith(".bias") and not tensor.any()
