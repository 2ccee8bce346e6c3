"""Merge the bytes of pretokens into tokens: the pair of lowest rank first, of equal ranks the leftmost, until none is
left (Sennrich et al., https://arxiv.org/abs/1508.07909). One pretoken at a time, or many at once in numpy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tinygpt.tokenizer.pairs import EMPTY, ROW_END, SHIFT, Pairs, Places, differs, pair_of

Ids = NDArray[np.int32]
Ranks = Mapping[tuple[int, int], tuple[int, int]]  # a pair of ids -> its rank and the id that it becomes

FEW = 8  # rows that are merged faster one by one
TOGETHER = 64  # bytes of the longest pretoken that is merged together with others
LONG = 2000  # ids of the shortest row that `merge` gives to `merge_long`
NO_RANK = np.iinfo(np.int64).max


def merge(ids: list[int], ranks: Ranks) -> list[int]:
    """Merge one row: merge([1, 2, 3], {(2, 3): (0, 4), (1, 4): (1, 5)}) -> [5]."""
    if len(ids) >= LONG:
        return merge_long(ids, ranks)
    ids, end = list(ids), len(ids)
    following, preceding = list(range(1, end + 1)), list(range(-1, end - 1))
    heap = [(*ranks[pair], i, *pair) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)  # (rank, merged id, position, left id, right id): by rank, then by position
    while heap:
        _, merged, i, left, right = heapq.heappop(heap)
        j = following[i]
        if ids[i] != left or j == end or ids[j] != right:
            continue  # one of the two has been merged with another neighbour since
        ids[i], ids[j] = merged, EMPTY
        following[i] = following[j]
        if following[i] < end:
            preceding[following[i]] = i
        for start in (preceding[i], i):
            after = following[start] if start >= 0 else end
            if after < end and (pair := (ids[start], ids[after])) in ranks:
                heapq.heappush(heap, (*ranks[pair], start, *pair))
    return [i for i in ids if i != EMPTY]


def merge_long(ids: list[int], ranks: Ranks) -> list[int]:
    """The same for a row of millions, such as a long word of one letter: a pair is merged everywhere at once."""
    pairs = Pairs(np.array([*ids, ROW_END], np.int32), np.zeros(len(ids) + 1, np.int32), np.ones(1, np.int64))
    ranked = {pair_of(*pair): found for pair, found in ranks.items()}
    used_at: dict[int, int] = {}  # the lowest rank of the merges that a token takes part in
    for parts, (rank, _) in ranks.items():
        for token in parts:
            used_at[token] = min(rank, used_at.get(token, rank))
    heap = [(*ranked[pair], pair) for pair in pairs.count if pair in ranked]
    heapq.heapify(heap)
    while heap:
        rank, merged, pair = heapq.heappop(heap)
        if not pairs.count.get(pair):
            continue
        # Where the new token might be merged on before the next place of this pair, one place at a time.
        everywhere = used_at.get(merged, math.inf) > rank
        grown = pairs.merge(pair, merged, leftmost=not everywhere)
        for other in {*grown, pair}:
            if other in ranked and pairs.count.get(other):
                heapq.heappush(heap, (*ranked[other], other))
    return pairs.ids[pairs.ids >= 0].tolist()


class Merger:
    """Merges the bytes of pretokens.  `byte_ids[byte]` is the id of a byte before any merge."""

    def __init__(self, byte_ids: Sequence[int], ranks: Ranks) -> None:
        self.byte_ids, self.ranks = np.array(byte_ids, np.int32), ranks
        by_pair = sorted((pair_of(*pair), rank) for pair, (rank, _) in ranks.items())
        by_pair.append((NO_RANK, NO_RANK))  # so that a search always ends at a place
        self._pairs, self._ranks = np.array(by_pair, np.int64).T.copy()
        first = np.repeat(self.byte_ids, 256).astype(np.int64) << SHIFT | np.tile(self.byte_ids, 256)
        self._byte_ranks = self._find(first)  # of all pairs of bytes, with which each row begins
        self._merged = np.zeros(1 + max((rank for rank, _ in ranks.values()), default=0), np.int32)
        for rank, merged in ranks.values():
            self._merged[rank] = merged

    def merge(self, raw: bytes) -> list[int]:
        """The ids of one pretoken."""
        return merge(self.byte_ids[np.frombuffer(raw, np.uint8)].tolist(), self.ranks)

    def merge_all(self, pretokens: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of pretokens, one after the other, and how many each has."""
        length = np.array([len(pretoken) for pretoken in pretokens], np.int64)
        together = length <= TOGETHER
        row = np.repeat(np.arange(len(pretokens)), np.where(together, length, 0))  # the pretoken of each id
        raw = b"".join([pretoken for pretoken in pretokens if len(pretoken) <= TOGETHER])
        parts = [*self._merge_rows(np.frombuffer(raw, np.uint8), row)]
        for i in np.flatnonzero(~together).tolist():
            alone = np.array(self.merge(pretokens[i]), np.int32)
            parts.append((alone, np.full(len(alone), i)))
        ids, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids[np.argsort(rows, kind="stable")], np.bincount(rows, minlength=len(pretokens))

    def _merge_rows(self, raw: NDArray[np.uint8], row: Places) -> Iterator[tuple[Ids, Places]]:
        """Merge one pair in each row of bytes, again and again; yield (ids, rows) when they are ready."""
        ids, rank = self.byte_ids[raw], np.full(len(raw), NO_RANK)  # rank of the pair that begins at each place
        within = np.flatnonzero(row[1:] == row[:-1])
        rank[within] = self._byte_ranks[raw[within].astype(np.int32) << 8 | raw[within + 1]]
        while len(ids):
            begin = np.flatnonzero(differs(row, row))
            if len(begin) <= FEW:
                yield from self._merge_each(ids, row)
                return
            size = np.diff(np.append(begin, len(row)))
            lowest = np.repeat(np.minimum.reduceat(rank, begin), size)
            kept = lowest != NO_RANK
            yield ids[~kept], row[~kept]
            at = np.flatnonzero(kept & (rank == lowest))
            at = at[differs(row[at], row[at])]  # the leftmost in each row
            ids[at] = self._merged[rank[at]]
            kept[at + 1] = False
            changed = np.zeros(len(ids), bool)
            changed[at] = changed[at - 1] = True  # a place before the first of a row has no pair anyway
            ids, row, rank, changed = ids[kept], row[kept], rank[kept], changed[kept]
            at = np.flatnonzero(changed)
            rank[at] = self._rank(ids, row, at)
        yield ids, row

    def _merge_each(self, ids: Ids, row: Places) -> Iterator[tuple[Ids, Places]]:
        """The same, row by row."""
        for i in np.unique(row).tolist():
            merged = np.array(merge(ids[row == i].tolist(), self.ranks), np.int32)
            yield merged, np.full(len(merged), i)

    def _rank(self, ids: Ids, row: Places, at: Places) -> NDArray[np.int64]:
        """Ranks of the pairs that begin at these places, NO_RANK where none does."""
        right = np.minimum(at + 1, len(ids) - 1)
        ranks = self._find(ids[at].astype(np.int64) << SHIFT | ids[right])
        return np.where((row[at] == row[right]) & (at != right), ranks, NO_RANK)

    def _find(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.searchsorted(self._pairs, pairs)
        return np.where(self._pairs[found] == pairs, self._ranks[found], NO_RANK)
