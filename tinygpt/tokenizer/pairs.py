"""Pairs of neighbouring tokens in many rows: how frequent each is, where it is, and merging it everywhere at once.

All rows are in one array, each place linked to its neighbours, so a merge touches only the places of its pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError

Places = NDArray[np.integer]  # indices into the array of all rows

SHIFT = 32  # a pair of ids as one number: left << SHIFT | right
KEY_BITS = 63  # a pair and its place as one number
ROW_END, EMPTY = -1, -2  # instead of an id: after each row, and where a merge has taken the token away


def pair_of(left: int, right: int) -> int:
    """Two ids as one number."""
    return left << SHIFT | right


def ids_of(pair: int) -> tuple[int, int]:
    """The two ids of a pair."""
    return pair >> SHIFT, pair & (1 << SHIFT) - 1


class Pairs:
    """The pairs in rows of ids that occur at least `at_least` times; `count[pair]` says how often.

    `ids` (N,) holds ROW_END after each row, `row` (N,) the row of each place, `weight` how often a row occurs. Counts
    only fall while merges make new tokens, because no merge makes neighbours of two tokens that are there. One that
    makes an old token once more breaks this: go on with `again()` after it.
    """

    def __init__(
        self, ids: NDArray[np.int32], row: NDArray[np.int32], weight: NDArray[np.int64], *, at_least: int = 1
    ) -> None:
        self.ids, self.row, self.weight, self.at_least = ids, row, weight, at_least
        self._n_id = int(ids.max(initial=0)) + 1
        self.next = np.arange(1, len(ids) + 1, dtype=np.int32)
        self.next[-1:] -= 1
        self.previous = np.arange(-1, len(ids) - 1, dtype=np.int32)
        self.count: dict[int, int] = {}
        self._places: dict[int, Places] = {}  # where a pair has stood; some may have changed since
        self._add(np.arange(len(ids), dtype=np.int32))

    def again(self, *, at_least: int) -> Pairs:
        """The pairs as they are now."""
        kept = self.ids != EMPTY
        return Pairs(self.ids[kept], self.row[kept], self.weight, at_least=at_least)

    def merge(self, pair: int, merged: int, *, leftmost: bool = False) -> list[int]:
        """Put the token `merged` where `pair` is, everywhere or once; return the pairs that have come up."""
        at = self._places_of(pair)
        if leftmost:
            self._places[pair], at = at, at[:1]
            self.count[pair] -= int(self.weight[self.row[at[0]]])
        else:
            del self.count[pair]
        right, before = self.next[at], self.previous[at]
        # A place stands for the pair that begins there. Two merges side by side share one: it counts once.
        self._remove(right, before[differs(before, right)])
        after = self.next[right]
        self.ids[at], self.ids[right] = merged, EMPTY
        self._n_id = max(self._n_id, merged + 1)
        self.next[at], self.previous[after] = after, at
        before = self.previous[at]
        return self._add(at, before[differs(before, at)])

    def _places_of(self, pair: int) -> Places:
        """The places where the pair is now, leftmost first and without overlap: "aaa" has "aa" once."""
        at = np.sort(self._places.pop(pair))
        left, right = ids_of(pair)
        at = at[(self.ids[at] == left) & (self.ids[self.next[at]] == right)]
        if left != right:
            return at
        overlaps = ~differs(at, self.next[at])
        index = np.arange(len(at))
        run_start = np.maximum.accumulate(np.where(overlaps, 0, index))
        return at[(index - run_start) % 2 == 0]

    def _add(self, *places: Places) -> list[int]:
        """Count the pairs that begin at these places; return those that are frequent enough."""
        at, pairs, begin, totals = self._grouped(*places)
        found = []
        for i in np.flatnonzero(totals >= self.at_least).tolist():
            pair = int(pairs[i])
            self.count[pair] = self.count.get(pair, 0) + int(totals[i])
            group = at[begin[i] : begin[i + 1]]
            self._places[pair] = np.concatenate([self._places[pair], group]) if pair in self._places else group
            found.append(pair)
        return found

    def _remove(self, *places: Places) -> None:
        """Take the pairs that begin at these places out of the counts."""
        _, pairs, _, totals = self._grouped(*places)
        for pair, total in zip(pairs.tolist(), totals.tolist(), strict=True):
            if pair in self.count:
                self.count[pair] -= total

    def _grouped(self, *places: Places) -> tuple[Places, NDArray[np.int64], NDArray[np.intp], NDArray[np.int64]]:
        """Places by the pair that begins there: places, the groups' pairs, where each begins, each group's weight."""
        at = places[0] if len(places) == 1 else np.concatenate(places)
        at = at[(at >= 0) & (self.ids[at] >= 0)]
        at = at[self.ids[self.next[at]] >= 0]
        id_bits, place_bits = self._n_id.bit_length(), len(self.ids).bit_length()
        if 2 * id_bits + place_bits > KEY_BITS:
            raise UserError("too many different words to learn from: lower tokenizer.max_bytes or tokenizer.vocab_size")
        keys = self.ids[at].astype(np.int64)  # left, right and place in one number, sorted in place: in little memory
        keys <<= id_bits
        keys |= self.ids[self.next[at]]
        keys <<= place_bits
        keys |= at
        keys.sort()
        np.bitwise_and(keys, (1 << place_bits) - 1, out=at, casting="unsafe")
        keys >>= place_bits
        begin = np.flatnonzero(np.concatenate([keys[:1] >= 0, keys[1:] != keys[:-1]]))
        pairs = keys[begin]
        totals = np.add.reduceat(self.weight[self.row[at]], begin) if len(at) else np.zeros(0, np.int64)
        pairs = (pairs >> id_bits) << SHIFT | pairs & (1 << id_bits) - 1
        return at, pairs, np.append(begin, len(at)), totals


def differs(places: Places, of_former: Places) -> NDArray[np.bool_]:
    """Where a place is another than the one that belongs to the entry before."""
    return np.concatenate(([True], places[1:] != of_former[:-1]))[: len(places)]
