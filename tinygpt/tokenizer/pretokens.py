"""The different pretokens of a text, numbered with the help of a cache in numpy arrays, and how often each occurs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.folders import cut_lines, shard_texts, split_file, thin
from tinygpt.files import atomic_write, sha256_file
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import Shard, shard_results
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, iter_blocks, pretoken_starts

Words = NDArray[np.uint64]
Numbers = NDArray[np.int32]

PretokenCounts = Counter[bytes]

MAX_PRETOKENS = 1_000_000  # different pretokens remembered, about 180 MB; more of them start the table anew
SLOT_BITS = 18  # of the cache: 5 MB, which most of a text's pretokens are found in
KEY_BYTES = 16  # pretokens up to this length are found by arrays, longer ones (about 1 in 100) by a dict
PIECE = 1 << 13  # pretokens looked up together: those of the next piece find what this one has put into the cache
# By number of bytes: the bits after them in a little-endian word. No UTF-8 has 0xFF, so different pretokens stay so.
PADDING = np.array([2**64 - 2 ** (8 * n) for n in range(9)], np.uint64)
NO_KEY = np.array([2**64 - 1, 0], np.uint64)  # that of no pretoken
# Odd and without pattern: the golden ratio's and sqrt(2)'s digits.
FACTORS = np.array([0x9E3779B97F4A7C15, 0x6A09E667F3BCC909], np.uint64)


class PretokenTable:
    """Different pretokens, numbered in the order in which they first came.

    `table.number(block)` gives the number of each pretoken in the block and learns the new ones;
    `table.pretokens[number]` is its bytes. Numbers are exact: keys are the bytes themselves.
    """

    def __init__(self) -> None:
        self.pretokens: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        # The cache: the last pretoken of each hash, as a key of two words, and its number.
        self._first, self._second = (np.full(1 << SLOT_BITS, word) for word in NO_KEY)
        self._cached = np.zeros(1 << SLOT_BITS, np.int32)

    def number(self, block: bytes) -> Numbers:
        """The number of each pretoken of a block (as iter_blocks gives it), in their order."""
        starts = pretoken_starts(block)
        first, second, is_long = _keys(block, starts)
        slots = (_hash(first, second) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        numbers = np.empty(len(slots), np.int32)
        for begin in range(0, len(slots), PIECE):
            piece = slice(begin, begin + PIECE)
            at = slots[piece]
            numbers[piece] = self._cached[at]
            differs = (self._first[at] != first[piece]) | (self._second[at] != second[piece]) | is_long[piece]
            missing = begin + np.flatnonzero(differs)
            at = slots[missing]
            places = zip(starts[missing].tolist(), starts[missing + 1].tolist(), strict=True)
            numbers[missing] = self._cached[at] = self._learn([block[start:end] for start, end in places])
            self._first[at], self._second[at] = first[missing], second[missing]
        return numbers

    def _learn(self, pretokens: list[bytes]) -> list[int]:
        for pretoken in pretokens:
            if self._numbers.setdefault(pretoken, len(self.pretokens)) == len(self.pretokens):
                self.pretokens.append(pretoken)
        return [self._numbers[pretoken] for pretoken in pretokens]


def _keys(block: bytes, starts: NDArray[np.int64]) -> tuple[Words, Words, NDArray[np.bool_]]:
    """Two words for each pretoken, NO_KEY for a long one, and whether it is one."""
    begin, length = starts[:-1], np.diff(starts)
    padded = np.frombuffer(block + bytes(2 * KEY_BYTES), np.uint8)
    words = np.ndarray((len(block) + KEY_BYTES,), "<u8", buffer=padded, strides=(1,))  # the word that begins at a byte
    first, second = words[begin] | PADDING[np.minimum(length, 8)], np.full(len(begin), PADDING[0])
    is_long = length > KEY_BYTES
    longer = np.flatnonzero((length > 8) & ~is_long)
    second[longer] = words[begin[longer] + 8] | PADDING[length[longer] - 8]
    first[is_long], second[is_long] = NO_KEY
    return first, second, is_long


def _hash(first: Words, second: Words) -> Words:
    mixed = first * FACTORS[0]
    return (mixed ^ mixed >> np.uint64(32) ^ second * FACTORS[1]) * FACTORS[0]


def count_pretokens(texts: Iterable[str], table: PretokenTable | None = None) -> PretokenCounts:
    """["to be to"] -> {b"to": 1, b" be": 1, b" to": 1}; `table` may know pretokens from other texts."""
    table, counts = table or PretokenTable(), np.zeros(0, np.int64)
    for block in iter_blocks(texts):
        numbers = table.number(block)
        more = np.bincount(numbers, minlength=len(table.pretokens))
        more[: len(counts)] += counts
        counts = more
    at = np.flatnonzero(counts)
    found = Counter(dict(zip(map(table.pretokens.__getitem__, at.tolist()), counts[at].tolist(), strict=True)))
    del found[DOCUMENT_BORDER]
    return found


def count_corpus(
    clean: Path, max_bytes: int | None, runtime: RuntimeParams, *, runs: Path | None = None
) -> PretokenCounts:
    """Count the training texts of data/clean, at most `max_bytes` of them, evenly taken: all that BPE learns from.

    `runs` is as in shard_results.
    """
    file = split_file(clean, "train")
    shards = thin(cut_lines(file), max_bytes or file.stat().st_size)
    key = [sha256_file(file), max_bytes]
    results = functools.partial(shard_results, code=__name__, runtime=runtime, runs=runs)
    with results(save_counts, shards, name="count", key=key) as paths:
        return sum_counts(paths)


def save_counts(shard: Shard, path: Path) -> None:
    """Count the pretokens of a shard of texts into a file of two numpy arrays."""
    found = count_pretokens(shard_texts(shard), _table())
    if len(_table().pretokens) > MAX_PRETOKENS:
        _table.cache_clear()
    pretokens = np.frombuffer(DOCUMENT_BORDER.join(found), np.uint8)
    with atomic_write(path, "wb") as file:
        np.savez(file, pretokens=pretokens, counts=np.array([*found.values()], np.int64))


@functools.cache
def _table() -> PretokenTable:
    """One table for all shards of a worker: what it learned from one serves the next."""
    return PretokenTable()


def sum_counts(paths: Iterable[Path]) -> PretokenCounts:
    """The counts of several files together."""
    _table.cache_clear()  # counting is over
    total = PretokenCounts()
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            pretokens = arrays["pretokens"].tobytes().split(DOCUMENT_BORDER)
            total.update(dict(zip(pretokens, arrays["counts"].tolist(), strict=False)))  # one too many where none is
    return total
