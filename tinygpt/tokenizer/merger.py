"""Merge the bytes of pretokens into tokens: always the pair of lowest rank, the leftmost first, until none is left
(Sennrich et al., https://arxiv.org/abs/1508.07909). `Merger` does it for many pretokens at once in numpy.

`Pairs` keeps many rows in one array and links each place to its neighbours, so that a merge touches only the places of
its pair. It serves very long rows here, and the training of BPE.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError

Ids = NDArray[np.int32]
Places = NDArray[np.integer]  # indices into the array of all rows

TOGETHER = 1024  # bytes of a pretoken; longer ones are merged alone
NO_RANK = np.iinfo(np.int64).max
SHIFT = 32  # a pair of ids as one number: left << SHIFT | right
KEY_BITS = 63  # of a pair and its place as one number
ROW_END, EMPTY = -1, -2  # in place of an id: after each row, and where a merge has removed the token


class Merger:
    """Merges the bytes of pretokens.  `byte_ids[byte]` is the id of a byte before any merge.

    `merges` are ids (left, right, merged), the lowest rank first.
    """

    def __init__(self, byte_ids: Sequence[int], merges: Sequence[tuple[int, int, int]]) -> None:
        self.byte_ids = np.array(byte_ids, np.int32)
        self.rank_of = {pair_of(left, right): rank for rank, (left, right, _) in enumerate(merges)}
        self._merged = np.array([merged for _, _, merged in merges], np.int32)
        by_pair = [*sorted(self.rank_of.items()), (NO_RANK, NO_RANK)]  # so that searchsorted always gives an index
        self._pairs, self._ranks = np.array(by_pair, np.int64).T.copy()
        first = np.repeat(self.byte_ids, 256).astype(np.int64) << SHIFT | np.tile(self.byte_ids, 256)
        self._byte_ranks = self._find(first)  # of all pairs of bytes, which are in the rows at first

    def merge_all(self, pretokens: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of pretokens, one after the other, and how many each has."""
        length = np.array([len(pretoken) for pretoken in pretokens], np.int64)
        together = length <= TOGETHER
        row = np.repeat(np.arange(len(pretokens)), np.where(together, length, 0))  # the pretoken of each id
        raw = b"".join([pretoken for pretoken in pretokens if len(pretoken) <= TOGETHER])
        parts = [*self._merge_rows(np.frombuffer(raw, np.uint8), row)]
        for i in np.flatnonzero(~together).tolist():
            alone = self._merge_long(pretokens[i])
            parts.append((alone, np.full(len(alone), i)))
        ids, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids[np.argsort(rows, kind="stable")], np.bincount(rows, minlength=len(pretokens))

    def _merge_long(self, pretoken: bytes) -> Ids:
        """Merge one row, which may have millions of bytes, such as a long word of one letter.

        So a pair is merged everywhere at once, or one place at a time if the new token might be merged again before
        this pair's next place.
        """
        ids = np.append(self.byte_ids[np.frombuffer(pretoken, np.uint8)], np.int32(ROW_END))
        pairs = Pairs(ids, np.zeros(len(ids), np.int32), np.ones(1, np.int64))
        used_at: dict[int, int] = {}  # the lowest rank of the merges that a token takes part in
        for pair, rank in self.rank_of.items():
            for token in ids_of(pair):
                used_at[token] = min(rank, used_at.get(token, rank))
        heap = [(self.rank_of[pair], pair) for pair in pairs.count if pair in self.rank_of]
        heapq.heapify(heap)
        while heap:
            rank, pair = heapq.heappop(heap)
            if not pairs.count.get(pair):  # it has gone into other merges
                continue
            merged = int(self._merged[rank])
            everywhere = used_at.get(merged, math.inf) > rank
            for other in {*pairs.merge(pair, merged, leftmost=not everywhere), pair}:
                if other in self.rank_of:
                    heapq.heappush(heap, (self.rank_of[other], other))
        return pairs.ids[pairs.ids >= 0]

    def _merge_rows(self, raw: NDArray[np.uint8], row: Places) -> Iterator[tuple[Ids, Places]]:
        """Merge one pair in each row of bytes, again and again; yield (ids, rows) of rows that are finished."""
        ids, rank = self.byte_ids[raw], np.full(len(raw), NO_RANK)  # rank of the pair that begins at each place
        within = np.flatnonzero(row[1:] == row[:-1])
        rank[within] = self._byte_ranks[raw[within].astype(np.int32) << 8 | raw[within + 1]]
        while len(ids):
            begin = np.flatnonzero(differs(row, row))
            size = np.diff(np.append(begin, len(row)))
            lowest = np.repeat(np.minimum.reduceat(rank, begin), size)
            kept = lowest != NO_RANK
            yield ids[~kept], row[~kept]
            at = np.flatnonzero(kept & (rank == lowest))
            at = at[differs(row[at], row[at])]  # the leftmost in each row
            ids[at] = self._merged[rank[at]]
            kept[at + 1] = False
            changed = np.zeros(len(ids), bool)
            changed[at] = changed[at - 1] = True  # before a row's first place no pair begins anyway
            ids, row, rank, changed = ids[kept], row[kept], rank[kept], changed[kept]
            at = np.flatnonzero(changed)
            right = np.minimum(at + 1, len(ids) - 1)
            ranks = self._find(ids[at].astype(np.int64) << SHIFT | ids[right])
            rank[at] = np.where((row[at] == row[right]) & (at != right), ranks, NO_RANK)  # none where a row ends
        yield ids, row  # empty, but of the right type

    def _find(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of pairs, NO_RANK for a pair that is never merged."""
        found = np.searchsorted(self._pairs, pairs)
        return np.where(self._pairs[found] == pairs, self._ranks[found], NO_RANK)


def pair_of(left: int, right: int) -> int:
    """Two ids as one number."""
    return left << SHIFT | right


def ids_of(pair: int) -> tuple[int, int]:
    """The two ids of a pair."""
    return pair >> SHIFT, pair & (1 << SHIFT) - 1


class Pairs:
    """The pairs in rows of ids that occur at least `at_least` times; `count[pair]` says how often.

    `ids` (N,) holds ROW_END after each row, `row` (N,) the row of each place, `weight` how often each row occurs. While
    merges make new tokens, the counts of existing pairs only fall, because a merge never makes neighbours of two
    existing tokens. A merge that makes an existing token breaks this: call `again()` after it.
    """

    def __init__(
        self, ids: NDArray[np.int32], row: NDArray[np.int32], weight: NDArray[np.int64], *, at_least: int = 1
    ) -> None:
        self.ids, self.row, self.weight, self.at_least = ids, row, weight, at_least
        self.next = np.arange(1, len(ids) + 1, dtype=np.int32)
        self.next[-1:] -= 1
        self.previous = np.arange(-1, len(ids) - 1, dtype=np.int32)
        self.count: dict[int, int] = {}
        self._places: dict[int, Places] = {}  # where a pair has stood; some may have changed since
        self._count_all()

    def again(self, *, at_least: int) -> Pairs:
        """Find the pairs anew, in the rows as they are now."""
        kept = self.ids != EMPTY
        return Pairs(self.ids[kept], self.row[kept], self.weight, at_least=at_least)

    def merge(self, pair: int, merged: int, *, leftmost: bool = False) -> list[int]:
        """Replace `pair` by the token `merged`, everywhere or only at its leftmost place -> new and frequent pairs."""
        at = self._places_of(pair)
        if leftmost:
            self._places[pair], at = at, at[:1]
            self.count[pair] -= int(self.weight[self.row[at[0]]])
        else:
            del self.count[pair]
        right, before = self.next[at], self.previous[at]
        after = self.next[right]
        weight, x, y = self.weight[self.row[at]], self.ids[before], self.ids[after]
        self.ids[at], self.ids[right] = merged, EMPTY
        self.next[at], self.previous[after] = after, at
        (left_id, right_id), found = ids_of(pair), []
        # Two merges side by side share the pair between them, which counts once.
        shared = np.append(~differs(before, right)[1:], False)
        for token, total, places in _groups(x, weight, before, np.append(True, ~shared[:-1])):
            found += self._replace(pair_of(token, left_id), pair_of(token, merged), total, places)
        for token, total, places in _groups(y, weight, at, ~shared):
            found += self._replace(pair_of(right_id, token), pair_of(merged, token), total, places)
        if shared.any():
            old, new = pair_of(right_id, left_id), pair_of(merged, merged)
            found += self._replace(old, new, int(weight[shared].sum()), at[shared])
        return found

    def _replace(self, old: int, new: int, total: int, at: Places) -> list[int]:
        """Count that `old` has become `new` at these places, `total` times -> [new] if that is frequent enough."""
        if old in self.count:
            self.count[old] -= total
        if total < self.at_least:
            return []
        self.count[new] = self.count.get(new, 0) + total
        self._places[new] = np.concatenate([self._places[new], at]) if new in self._places else at
        return [new]

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

    def _count_all(self) -> None:
        at = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)  # not where a row ends
        id_bits, place_bits = (int(self.ids.max(initial=0)) + 1).bit_length(), len(self.ids).bit_length()
        if 2 * id_bits + place_bits > KEY_BITS:
            raise UserError("too many different words to learn from: lower tokenizer.max_bytes or tokenizer.vocab_size")
        keys = self.ids[at].astype(np.int64)  # left, right and place in one number: sorting in place saves memory
        keys <<= id_bits
        keys |= self.ids[at + 1]
        keys <<= place_bits
        keys |= at
        keys.sort()
        np.bitwise_and(keys, (1 << place_bits) - 1, out=at, casting="unsafe")
        keys >>= place_bits
        begin = np.flatnonzero(differs(keys, keys))
        totals = np.add.reduceat(self.weight[self.row[at]], begin) if len(at) else np.zeros(0, np.int64)
        end = np.append(begin[1:], len(at))
        for i in np.flatnonzero(totals >= self.at_least).tolist():
            pair = int(keys[begin[i]])
            pair = pair_of(pair >> id_bits, pair & (1 << id_bits) - 1)
            self.count[pair], self._places[pair] = int(totals[i]), at[begin[i] : end[i]]


def _groups(
    ids: Ids, weight: NDArray[np.int64], at: Places, wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, int, Places]]:
    """For each id in the wanted entries: the id, its total weight, its places."""
    chosen = np.flatnonzero(wanted & (ids >= 0))
    if len(chosen):
        keys = ids[chosen].astype(np.int64) << SHIFT | chosen  # much faster to sort than argsort
        keys.sort()
        order, tokens = keys & (1 << SHIFT) - 1, keys >> SHIFT
        begin = np.flatnonzero(differs(tokens, tokens))
        totals, places, ends = np.add.reduceat(weight[order], begin), at[order], [*begin[1:].tolist(), len(at)]
        for token, total, first, end in zip(tokens[begin].tolist(), totals.tolist(), begin.tolist(), ends, strict=True):
            yield token, total, places[first:end]


def differs(places: Places, of_former: Places) -> NDArray[np.bool_]:
    """Whether each place differs from what `of_former` has for the entry before."""
    return np.concatenate(([True], places[1:] != of_former[:-1]))[: len(places)]
