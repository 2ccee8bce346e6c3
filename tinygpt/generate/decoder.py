"""Sequences that are continued together, one token at a time.  B rows, T tokens, V vocab_size."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.model import GPT
from tinygpt.model.kv_cache import KVCache


class Decoder:
    """Rows of sequences; `logits` (B, V) are float32, of the token that follows each row.

    A row never fills more than the model's block_size: of a longer prompt the end is read, and when the context is
    full its older half is forgotten and the newer half read again. Rows do not touch each other: whatever runs beside
    it, a row has the logits that it has alone.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, of any lengths.  Raises UserError when one has no id."""
        if not all(prompts):
            raise UserError("prompt is empty: give at least one id, such as the tokenizer's bos_id")
        self.model = model
        self._rows = [_Row(model, list(prompt)) for prompt in prompts]

    @property
    def logits(self) -> Tensor:
        """(B, V)"""
        return torch.stack([row.logits for row in self._rows])

    def step(self, ids: Sequence[int]) -> None:
        """Append one id to each row."""
        for row, next_id in zip(self._rows, ids, strict=True):
            row.read(next_id)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order: a row may be left out, or stand there several times."""
        used: set[int] = set()
        kept = []
        for i in rows:
            kept.append(copy.deepcopy(self._rows[i], {id(self.model): self.model}) if i in used else self._rows[i])
            used.add(i)
        self._rows = kept


class _Row:
    """One sequence with its cache."""

    def __init__(self, model: GPT, prompt: list[int]) -> None:
        self.model = model
        self._begin(prompt[-model.config.block_size :])

    def read(self, next_id: int) -> None:
        """Append an id."""
        self.seen.append(next_id)
        block_size = self.model.config.block_size
        if self.cache.n_seen < block_size:
            self._forward([next_id])
        else:
            self._begin(self.seen[-(block_size // 2 + 1) :])

    def _begin(self, ids: list[int]) -> None:
        config, device = self.model.config, self.model.tok_emb.weight.device
        self.seen = ids
        self.cache = KVCache(config, max_tokens=config.block_size, device=device)
        self._forward(ids)

    def _forward(self, ids: list[int]) -> None:
        with torch.inference_mode():
            hidden = self.model.hidden(torch.tensor([ids], device=self.cache.keys.device), self.cache)  # (1, T, C)
            self.logits = self.model.lm_head(hidden[0, -1]).float()  # (V,)
