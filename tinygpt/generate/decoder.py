"""Sequences that are continued together, one token at a time, and the cache of their keys and values.

A token's keys and values are in the slot of its position, modulo the layer's number of slots: block_size, or window +
`room` in a layer with a window. Caches of long contexts grow as they fill. The order of slots does not matter, since
positions are part of the keys. Tokens that were taken back stay in their slots, unread, until others overwrite them.

B rows, T tokens of one row, M tokens of all, S slots, H query heads, G key/value heads, D head_dim, V vocab_size.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.generate.lean import Attend, LeanGPT
from tinygpt.model.attention import attention_mask
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.layers import first_room, more_room


class KVCache:
    """Keys and values of `n_row` sequences; the last `room` tokens of each may be taken back."""

    def __init__(
        self, config: GPTConfig, n_row: int, *, dtype: torch.dtype, device: torch.device, room: int = 0
    ) -> None:
        self.n_kv_head, self.dtype, self.device = config.n_kv_head, dtype, device
        self.windows = [config.window_of(layer) for layer in range(config.n_layer)]
        self.block_size, self.room = config.block_size, first_room(config.block_size)  # the latter grows
        self.n_slots = {w: min(w + room, config.block_size) if w else config.block_size for w in self.windows}
        shapes = [(n_row, self.n_kv_head, min(self.n_slots[w], self.room), config.head_dim) for w in self.windows]
        # Keys and values, (B, G, S, D) each. They start as zeros because even an unread slot is multiplied, by a weight
        # of 0, and NaN would spread.
        self.layers = [
            (torch.zeros(s, dtype=dtype, device=device), torch.zeros(s, dtype=dtype, device=device)) for s in shapes
        ]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order.  (B,) int64"""
        self.layers = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.layers]

    def grow(self, n_row: int) -> None:
        """Add this many rows after the others."""
        more = (0, 0, 0, 0, 0, 0, 0, n_row)  # F.pad begins with the last dimension
        self.layers = [(F.pad(keys, more), F.pad(values, more)) for keys, values in self.layers]

    def reserve(self, n: int) -> None:
        """Make room for the first n positions."""
        if n > self.room:
            self.room = more_room(n, self.block_size)
            for layer, (keys, values) in enumerate(self.layers):
                more = (0, 0, 0, min(self.n_slots[self.windows[layer]], self.room) - keys.size(2))
                self.layers[layer] = F.pad(keys, more), F.pad(values, more)

    def append(self, at: Sequence[int]) -> Attend:
        """Attention of one more token per row, at these positions; each sees its row up to itself."""
        self.reserve(max(at) + 1)
        first, last, rows = min(at), max(at), torch.arange(len(at), device=self.device)
        positions = torch.tensor(at, device=self.device)
        column = positions[:, None, None, None]
        masks = {window: self._mask(column, column, first, last, window) for window in self.n_slots}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached, window = self.layers[layer], self.windows[layer]
            for slots, new in zip(cached, (k, v), strict=True):
                if first == last:
                    slots.select(2, last % self.n_slots[window]).copy_(new)
                else:
                    slots[rows, :, positions % self.n_slots[window]] = new
            keys, values = (slots[:, :, : last + 1] for slots in cached)
            q = q.unflatten(1, (self.n_kv_head, -1))  # (B, G, H / G, D): the heads of a group read the same keys
            return F.scaled_dot_product_attention(q, keys, values, masks[window]).reshape(len(q), -1)

        return attend

    def extend(self, at: int, n: int) -> Attend:
        """Attention of n more tokens of the only row, at most room + 1, the first of them at this position."""
        self.reserve(at + n)
        new = torch.arange(at, at + n, device=self.device)
        places = {window: new % n_slot for window, n_slot in self.n_slots.items()}
        masks = {window: self._mask(new[:, None], new[-1:], at, at + n - 1, window) for window in self.n_slots}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached, window = self.layers[layer], self.windows[layer]
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # (M, H, D) -> (H, M, D)
            for slots, part in zip(cached, (k, v), strict=True):
                slots[0].index_copy_(1, places[window], part)
            keys, values = (slots[0, :, : at + n] for slots in cached)
            return _sdpa(q, keys, values, masks[window])

        return attend

    def _mask(self, at: Tensor, newest: Tensor, first: int, last: int, window: int | None) -> Tensor | None:
        """The mask of tokens at positions `at`, from `first` to `last`; None where each sees all slots read."""
        n_slot = self.n_slots[window]
        n = min(last + 1, n_slot)
        if first + 1 >= n and n <= (window or n):
            return None
        slots = torch.arange(n, device=self.device)
        return slot_mask(at, newest, slots, n_slot, window, dtype=self.dtype)

    def fill(self, rows: Sequence[int], sizes: Sequence[int]) -> Attend:
        """Attention of whole sequences, one after the other, which replace what these rows held.

        In the last layer, only the last token of each sequence attends.
        """
        self.reserve(max(sizes))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (keys, values), window, read = self.layers[layer], self.windows[layer], []
            n_slot, only_last = keys.size(2), layer == len(self.layers) - 1
            each = zip(*(part.transpose(0, 1).split(list(sizes), 1) for part in (q, k, v)), strict=True)  # (H, T, D)
            for row, t, (q1, k1, v1) in zip(rows, sizes, each, strict=True):
                places = torch.arange(max(0, t - n_slot), t, device=self.device) % n_slot
                keys[row].index_copy_(1, places, k1[:, -n_slot:])
                values[row].index_copy_(1, places, v1[:, -n_slot:])
                if only_last:
                    n_seen = window or n_slot
                    read.append(_sdpa(q1[:, -1:], k1[:, -n_seen:], v1[:, -n_seen:]))
                else:
                    mask = attention_mask(t, window, self.device)
                    read.append(_sdpa(q1, k1, v1, mask, is_causal=mask is None))
            return torch.cat(read) if len(read) > 1 else read[0]

        return attend


def slot_mask(
    at: Tensor, newest: Tensor, slots: Tensor, n_slot: int, window: int | None, *, dtype: torch.dtype
) -> Tensor:
    """0 for the slots that a token at position `at` sees, -inf for others, in a row read up to position `newest`.

    The layer has n_slot slots. With 4 slots, a window of 3 and a row read up to position 5, slots 0 and 1 hold tokens 4
    and 5, slots 2 and 3 hold tokens 2 and 3: token 5 sees 3, 4 and 5. Shapes are broadcast.
    """
    behind = at - newest + (newest - slots) % n_slot  # how far before `at` the token in each slot is
    hidden = (behind < 0) | (behind > at) | (behind >= (window or n_slot))
    return torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill(hidden, -torch.inf)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """(H, T, D), (G, T, D), (G, T, D) -> (T, H·D)"""
    q, k, v = q[None], k[None], v[None]
    many = q.size(1) != k.size(1)
    read = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=many)[0]
    return read.transpose(0, 1).flatten(1)


# A faster step than the lean one, for models that have it (compiled.py): one id per row, their positions and the
# cache -> logits (B, V), or None where it is not made for so many rows or these positions.
Step = Callable[[Sequence[int], Sequence[int], KVCache], Tensor | None]
STEPS: WeakKeyDictionary[GPT, Step] = WeakKeyDictionary()


def slide(seen: list[int], block_size: int) -> bool:
    """Forget the older half of a context that has a token too many -> whether it had: if so, read the rest again."""
    is_full = len(seen) > block_size
    if is_full:
        del seen[: -(block_size // 2 + 1)]
    return is_full


class Decoder:
    """Rows of sequences; `logits` (B, V) float32 are those of the token that follows each row.

    A row never exceeds the model's block_size: only the end of a longer prompt is read, and when the context is full,
    its older half is forgotten and the newer half read again. Rows are independent: a row has the same logits as if it
    were alone, up to rounding.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], *, room: int = 0) -> None:
        """Read prompts of any lengths; the last `room` tokens may be taken back.

        Raises UserError when a prompt has no id.
        """
        self._model = LeanGPT(model)
        embedding = self._model.embedding
        self._block_size, self._device = model.config.block_size, embedding.device
        self._step = STEPS.get(model)
        self._seen: list[list[int]] = []
        self._cache = KVCache(model.config, 0, dtype=embedding.dtype, device=self._device, room=room)
        self.logits = torch.empty(0, len(embedding), device=self._device)
        self.join(prompts)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read more prompts, as rows after the existing ones.  Raises UserError when one has no id."""
        if not all(prompts):
            raise UserError("prompt is empty: give at least one id, such as the tokenizer's bos_id")
        if prompts:
            n = len(self._seen)
            self._seen += [list(prompt[-self._block_size :]) for prompt in prompts]
            self._cache.grow(len(prompts))
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
        logits = self._step(ids, at, self._cache) if self._step else None
        if logits is None:
            logits = self._logits(ids, at, self._cache.append(at))
        self.logits = logits
        if full:  # overwrite the logits that they just got
            self.logits[full] = self._read(full)

    def n_free(self) -> int:
        """How many more tokens fit in the context of every row."""
        return self._block_size - max(map(len, self._seen))

    @torch.inference_mode()
    def advance(self, ids: Sequence[int]) -> Tensor:
        """Append 1 to room + 1 ids, at most `n_free()`, to the only row -> the logits after each, (T, V)."""
        (seen,) = self._seen
        begin = len(seen)
        seen += ids
        logits = self._logits(ids, range(begin, len(seen)), self._cache.extend(begin, len(ids)))
        self.logits = logits[-1:]
        return logits

    def back(self, n: int) -> None:
        """Forget the last n tokens of the only row, which may end up at most `room` shorter than it has ever been.

        `logits` are valid again after the next token.
        """
        (seen,) = self._seen
        del seen[len(seen) - n :]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be left out or repeated."""
        if list(rows) != list(range(len(self._seen))):
            self._seen = [list(self._seen[row]) for row in rows]
            self._cache.keep(self._tensor(rows))
            self.logits = self.logits[list(rows)]

    @torch.inference_mode()
    def _read(self, rows: Sequence[int]) -> Tensor:
        """Read these rows from their beginning, in one pass over all their tokens.  -> logits (B, V)"""
        sizes = [len(self._seen[row]) for row in rows]
        ids = [i for row in rows for i in self._seen[row]]
        positions = [position for size in sizes for position in range(size)]
        last = self._tensor(sizes).cumsum(0) - 1
        return self._logits(ids, positions, self._cache.fill(rows, sizes), last)

    def _logits(self, ids: Sequence[int], at: Sequence[int], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        turns = self._model.turns(max(at) + 1)
        return self._model.logits(self._tensor(ids), self._tensor(at), turns, attend, wanted)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
