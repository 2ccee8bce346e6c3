"""Keys and values of rows that are continued together, and how their tokens attend to them.

A token's keys and values stand in the slot of its position, modulo the number of slots of the layer: block_size, or the
window where it has one and `room` more. Slots are read in any order, since positions are part of the keys. Tokens that
were taken back stay in their slots until others come; nobody sees them.

B rows, T tokens of one row, M of all, S slots, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinygpt.generate.lean import Attend
from tinygpt.model.attention import attention_mask
from tinygpt.model.config import GPTConfig


class Slots:
    """Room for one sequence in each of `n_row` rows, of which the last `room` tokens may be taken back."""

    def __init__(
        self, config: GPTConfig, n_row: int, *, dtype: torch.dtype, device: torch.device, room: int = 0
    ) -> None:
        self.n_kv_head, self.dtype, self.device = config.n_kv_head, dtype, device
        self.windows = [config.window_of(layer) for layer in range(config.n_layer)]
        sizes = [min(window + room, config.block_size) if window else config.block_size for window in self.windows]
        self.has_more = any(window and window < size for window, size in zip(self.windows, sizes, strict=True))
        shapes = [(n_row, self.n_kv_head, size, config.head_dim) for size in sizes]
        # Keys and values, (B, G, S, D) each; zeros because what stands in an unread slot is still multiplied by a
        # weight of 0.
        self.layers = [
            (torch.zeros(s, dtype=dtype, device=device), torch.zeros(s, dtype=dtype, device=device)) for s in shapes
        ]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order.  (B,) int64"""
        self.layers = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.layers]

    def grow(self, n_row: int) -> None:
        """So many rows more, behind the others."""
        self.layers = [(_with_more(keys, n_row), _with_more(values, n_row)) for keys, values in self.layers]

    def append(self, at: Sequence[int]) -> Attend:
        """For one more token in each row, at these positions: each sees its row up to itself."""
        if self.has_more:
            return self.extend(at, [1] * len(at))
        first, last, rows = min(at), max(at), torch.arange(len(at), device=self.device)
        positions = torch.tensor(at, device=self.device)
        masks = {n_slot: self._mask(positions, first, last, n_slot) for n_slot in {k.size(2) for k, _ in self.layers}}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            slots, n_slot = self.layers[layer], self.layers[layer][0].size(2)
            for there, new in zip(slots, (k, v), strict=True):
                if first == last:
                    there.select(2, last % n_slot).copy_(new)
                else:
                    there[rows, :, positions % n_slot] = new
            keys, values = (there[:, :, : last + 1] for there in slots)
            q = q.unflatten(1, (self.n_kv_head, -1))  # (B, G, H / G, D): a group of heads reads the same keys
            return F.scaled_dot_product_attention(q, keys, values, masks[n_slot]).reshape(len(q), -1)

        return attend

    def _mask(self, positions: Tensor, first: int, last: int, n_slot: int) -> Tensor | None:
        """0 for the slots that a row has filled, -inf for others; None where all rows have.  -> (B, 1, 1, S)"""
        n = min(last + 1, n_slot)
        if first + 1 >= n:
            return None
        empty = torch.arange(n, device=self.device) > positions[:, None, None, None]
        return torch.zeros(empty.shape, dtype=self.dtype, device=self.device).masked_fill(empty, -torch.inf)

    def extend(self, at: Sequence[int], sizes: Sequence[int]) -> Attend:
        """For some more tokens in each row, at most room + 1, the first of them at these positions; row behind row."""
        spans = list(zip(at, sizes, strict=True))
        n_slots = {window: keys.size(2) for window, (keys, _) in zip(self.windows, self.layers, strict=True)}
        places = {w: [torch.arange(i, i + n, device=self.device) % n_slots[w] for i, n in spans] for w in n_slots}
        masks = {w: [self._visible(i, n, n_slots[w], w) for i, n in spans] for w in n_slots}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (keys, values), window, read = self.layers[layer], self.windows[layer], []
            for row, (q1, k1, v1) in enumerate(_by_row(sizes, q, k, v)):
                keys[row].index_copy_(1, places[window][row], k1)
                values[row].index_copy_(1, places[window][row], v1)
                seen = slice(0, at[row] + sizes[row])
                read.append(_sdpa(q1, keys[row, :, seen], values[row, :, seen], masks[window][row]))
            return _joined(read)

        return attend

    def _visible(self, first: int, n: int, n_slot: int, window: int | None) -> Tensor | None:
        """0 for the slots that each of n successive tokens sees, the last of them written, else -inf.  -> (T, S)

        None where they see all.
        """
        last = first + n - 1
        if n == 1 and (window is None or last < window):
            return None
        slots, queries = torch.arange(min(last + 1, n_slot), device=self.device), range(first, last + 1)
        there = last - (last - slots) % n_slot  # the position whose token stands in each
        behind = torch.tensor(queries, device=self.device)[:, None] - there
        hidden = (behind < 0) | (behind >= (window or n_slot))
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill(hidden, -torch.inf)

    def fill(self, rows: Sequence[int], sizes: Sequence[int]) -> Attend:
        """For whole sequences, one behind the other, in the place of what these rows held; in the last layer only the
        last token of each reads.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (keys, values), window, read = self.layers[layer], self.windows[layer], []
            n_slot, only_last = keys.size(2), layer == len(self.layers) - 1
            for row, t, (q1, k1, v1) in zip(rows, sizes, _by_row(sizes, q, k, v), strict=True):
                places = torch.arange(max(0, t - n_slot), t, device=self.device) % n_slot
                keys[row].index_copy_(1, places, k1[:, -n_slot:])
                values[row].index_copy_(1, places, v1[:, -n_slot:])
                if only_last:
                    n_seen = window or n_slot
                    read.append(_sdpa(q1[:, -1:], k1[:, -n_seen:], v1[:, -n_seen:]))
                else:
                    mask = attention_mask(t, window, self.device)
                    read.append(_sdpa(q1, k1, v1, mask, is_causal=mask is None))
            return _joined(read)

        return attend


def _with_more(slots: Tensor, n_row: int) -> Tensor:
    """(B, …) -> (B + n_row, …), the new ones zeros"""
    new = slots.new_zeros(n_row, *slots.shape[1:])
    return torch.cat((slots, new)) if len(slots) else new


def _by_row(sizes: Sequence[int], *heads: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Queries, keys and values of each row.  (M, H, D) -> (H, T, D)"""
    return zip(*(part.transpose(0, 1).split(list(sizes), 1) for part in heads), strict=True)


def _joined(read: Sequence[Tensor]) -> Tensor:
    """What the heads of each row read, one row behind the other.  (H, T, D) -> (M, H·D)"""
    flat = [heads.transpose(0, 1).flatten(1) for heads in read]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """(H, T, D), (G, T, D), (G, T, D) -> (H, T, D)"""
    q, k, v = q[None], k[None], v[None]
    many = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=many)[0]
