"""Attention maps: how much weight each head of a model gives to each token of a text.  T tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.model.attention import Attention, attention_weights, repeated
from tinygpt.model.gpt import GPT


def attention_maps(model: GPT, ids: list[int], *, rows: slice = slice(None)) -> NDArray[np.float32]:
    """The weights of every layer and head for one sequence.  (T,) -> (n_layer, n_head, T, T), rows sum to 1

    `rows` are the tokens whose weights are returned; None: all.
    """
    maps: list[Tensor] = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = attention_weights(q, k, mask)
        maps.append(weights[0, :, rows].clone())  # not a view that keeps the other rows
        return weights @ repeated(v, q)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    attends = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = record
        with torch.inference_mode():
            model(torch.tensor([ids], device=model.tok_emb.weight.device))
    finally:
        for layer, attend in zip(layers, attends, strict=True):
            layer.attend = attend
    return torch.stack(maps).float().cpu().numpy()
