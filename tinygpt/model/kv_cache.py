"""Keys and values of the tokens seen so far, so that each new token costs one position and not the whole context."""

from __future__ import annotations

import torch
from torch import Tensor

from tinygpt.model.config import GPTConfig


class KVCache:
    """Room for `max_tokens` positions of every layer.  Pass it to `model(ids, cache)`, which fills and advances it."""

    def __init__(
        self, config: GPTConfig, *, batch_size: int = 1, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_tokens, config.head_dim)
        self.keys = torch.empty(shape, device=device)
        self.values = torch.empty(shape, device=device)
        self.n_seen = 0  # positions filled in every layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, G, T, D) of one layer and return all of its keys and values, (B, G, n_seen + T, D) each."""
        end = self.n_seen + k.size(2)
        self.keys[layer, :, :, self.n_seen : end] = k
        self.values[layer, :, :, self.n_seen : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more positions as seen, after every layer has stored them."""
        self.n_seen += n_tokens
