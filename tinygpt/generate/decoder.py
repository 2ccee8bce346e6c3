"""Sequences that are continued together, one token at a time.  B rows, V vocab_size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.generate.compiled import compiled_step
from tinygpt.generate.lean import LeanGPT
from tinygpt.generate.slots import Slots
from tinygpt.model.gpt import GPT


def slide(seen: list[int], block_size: int) -> bool:
    """Forget the older half of a context that has a token too many -> whether it had: its rest is to be read again."""
    is_full = len(seen) > block_size
    if is_full:
        del seen[: -(block_size // 2 + 1)]
    return is_full


class Decoder:
    """Rows of sequences; `logits` (B, V) are float32, of the token that follows each row.

    A row never fills more than the model's block_size: of a longer prompt the end is read, and when the context is
    full its older half is forgotten and the newer half read again. Rows do not touch each other: whatever runs beside
    it, a row has the logits that it has alone, up to rounding.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], *, room: int = 0) -> None:
        """Read the prompts, of any lengths; the last `room` tokens may be taken back.

        Raises UserError when a prompt has no id.
        """
        embedding = model.tok_emb.weight
        self._model, self._block_size, self._device = LeanGPT(model), model.config.block_size, embedding.device
        self._compiled = compiled_step(model)
        self._seen: list[list[int]] = []
        self._slots = Slots(model.config, 0, dtype=embedding.dtype, device=self._device, room=room)
        self.logits = torch.empty(0, len(embedding), device=self._device)
        self.join(prompts)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read more prompts, as rows behind those that are there.  Raises UserError when one has no id."""
        if not all(prompts):
            raise UserError("prompt is empty: give at least one id, such as the tokenizer's bos_id")
        if prompts:
            n = len(self._seen)
            self._seen += [list(prompt[-self._block_size :]) for prompt in prompts]
            self._slots.grow(len(prompts))
            self.logits = torch.cat((self.logits, self._read(range(n, len(self._seen)))))

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> None:
        """Append one id to each row."""
        full = []
        for row, (seen, next_id) in enumerate(zip(self._seen, ids, strict=True)):
            seen.append(next_id)
            if slide(seen, self._block_size):
                full.append(row)
        if len(full) == len(self._seen):
            self.logits = self._read(full)
            return
        at = [len(seen) - 1 for seen in self._seen]
        if self._compiled and self._compiled.fits(at):
            self.logits = self._compiled(ids, at, self._slots)
        else:
            self.logits = self._model.logits(self._tensor(ids), self._tensor(at), self._slots.append(at))
        if full:  # what they got just now is overwritten
            self.logits[full] = self._read(full)

    def n_free(self) -> int:
        """How many tokens more the context of every row holds."""
        return self._block_size - max(map(len, self._seen))

    @torch.inference_mode()
    def advance(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append some ids to each row, 1 to room + 1 and at most `n_free()` -> the logits after each, (T, V) a row."""
        at, sizes = [len(seen) for seen in self._seen], [len(new) for new in ids]
        positions = [begin + i for begin, size in zip(at, sizes, strict=True) for i in range(size)]
        attend = self._slots.extend(at, sizes)
        logits = self._model.logits(self._tensor([i for new in ids for i in new]), self._tensor(positions), attend)
        for seen, new in zip(self._seen, ids, strict=True):
            seen += new
        self.logits = logits[self._tensor(sizes).cumsum(0) - 1]
        return list(logits.split(sizes))

    def back(self, n: Sequence[int]) -> None:
        """Forget the last n[i] tokens of row i: at most `room` of the longest that it has ever been.

        `logits` are of use again after the next token.
        """
        for seen, k in zip(self._seen, n, strict=True):
            del seen[len(seen) - k :]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order: a row may be left out, or stand there several times."""
        if list(rows) != list(range(len(self._seen))):
            self._seen = [list(self._seen[row]) for row in rows]
            self._slots.keep(self._tensor(rows))
            self.logits = self.logits[list(rows)]

    @torch.inference_mode()
    def _read(self, rows: Sequence[int]) -> Tensor:
        """Read some rows from their beginning, in one pass over the tokens of all.  -> logits (B, V)"""
        sizes = [len(self._seen[row]) for row in rows]
        ids = self._tensor([i for row in rows for i in self._seen[row]])
        positions = self._tensor([position for size in sizes for position in range(size)])
        last = self._tensor(sizes).cumsum(0) - 1
        return self._model.logits(ids, positions, self._slots.fill(rows, sizes), last)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
