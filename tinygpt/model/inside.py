"""What is inside a model: the weights and operations of its parts, and where its heads look.  T tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinygpt.model.attention import Attention, attention_weights
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT

PLACES = {  # text in a weight's name -> the part of the model that the weight belongs to
    "norm": "norms",
    "tok_emb": "embedding",
    "pos_emb": "positions",
    ".attn.": "attention",
    ".mlp.": "mlp",
    "lm_head": "head",
}
ORDER = ("embedding", "positions", "attention", "mlp", "norms", "head")  # as a token passes through them


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Part:
    """One part of the model, added up over all layers."""

    shapes: dict[str, list[int]] = field(default_factory=dict)  # by name, of the first layer
    n_weights: int = 0
    operations: float = 0.0  # floating-point, per token of a full context in a forward pass; matrix products only


def parts_of(model: GPT) -> dict[str, Part]:
    """The parts that the model has, in the order of ORDER; a tied head has operations but not weights."""
    parts = {name: Part() for name in ORDER}
    for name, weight in model.named_parameters():
        part = parts[part_of(name)]
        part.n_weights += weight.numel()
        if "blocks." not in name or name.startswith("blocks.0."):
            part.shapes[name.removeprefix("blocks.0.")] = list(weight.shape)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts[part_of(f"{name}.")].operations += 2 * module.weight.numel()
    parts["attention"].operations += attention_operations(model.config)
    return {name: part for name, part in parts.items() if part.n_weights or part.operations}


def part_of(name: str) -> str:
    """The part to which a weight of this name belongs."""
    return next(part for place, part in PLACES.items() if place in name)


def attention_operations(config: GPTConfig) -> float:
    """Those of queries with keys and of attention weights with values, per token of a full context, forwards."""
    t = config.block_size
    windows = [min(t, config.window_of(layer) or t) for layer in range(config.n_layer)]
    seen = [(w * (w + 1) / 2 + (t - w) * w) / t for w in windows]  # tokens on average, the token itself included
    return sum(2 * 2 * n * config.n_head * config.head_dim for n in seen)


def attention_maps(model: GPT, ids: list[int], *, rows: slice = slice(None)) -> NDArray[np.float32]:
    """The attention weights of every layer and head, for these `rows` of T.  (T,) -> (n_layer, n_head, rows, T)"""
    maps: list[Tensor] = []

    def record(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        places = torch.arange(q.size(2), device=q.device)
        seen = places[rows, None] >= places if mask is None else mask[rows]
        maps.append(attention_weights(q[:, :, rows], k, seen)[0])
        return attend(q, k, v, mask)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    attends = [layer.attend for layer in layers]
    try:
        for layer, attend in zip(layers, attends, strict=True):
            layer.attend = partial(record, attend)
        with torch.inference_mode():
            model.hidden(torch.tensor([ids], device=model.tok_emb.weight.device))
    finally:
        for layer, attend in zip(layers, attends, strict=True):
            layer.attend = attend
    return torch.stack(maps).float().cpu().numpy()
