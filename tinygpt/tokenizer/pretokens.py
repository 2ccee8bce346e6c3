"""The different pretokens of a text, numbered by a hash table in numpy arrays, and how often each occurs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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

MAX_PRETOKENS = 1_000_000  # different pretokens remembered, about 150 MB; more of them start the table anew
UNKNOWN = -1
KEY_BYTES = 16  # pretokens up to this length are found by arrays, longer ones (about 1 in 100) by a dict
# By number of bytes: the bits after them in a little-endian word. No UTF-8 has 0xFF, so different pretokens stay so.
PADDING = np.array([2**64 - 2 ** (8 * n) for n in range(9)], np.uint64)
# Odd and without pattern: the golden ratio's and sqrt(2)'s digits.
FACTORS = np.array([0x9E3779B97F4A7C15, 0x6A09E667F3BCC909], np.uint64)


class _Keys(NamedTuple):
    """Pretokens of at most 16 bytes as two words each, and their hash."""

    first: Words
    second: Words
    hash: Words

    def at(self, places: NDArray[np.int64]) -> _Keys:
        return _Keys(self.first[places], self.second[places], self.hash[places])


class PretokenTable:
    """Different pretokens, numbered in the order in which they first came.

    `table.number(block)` gives the number of each pretoken in the block and learns the new ones;
    `table.pretokens[number]` is its bytes. Numbers are exact: keys are the bytes themselves.
    """

    def __init__(self) -> None:
        self.pretokens: list[bytes] = []
        self._long: dict[bytes, int] = {}
        self._first, self._second = np.empty(1 << 12, np.uint64), np.empty(1 << 12, np.uint64)  # keys by number
        self._slots = np.full(1 << 14, UNKNOWN, np.int32)  # open addressing: the number whose key hashed here

    def number(self, block: bytes) -> Numbers:
        """The number of each pretoken of a block (as iter_blocks gives it), in their order."""
        starts = pretoken_starts(block)
        begin, length = starts[:-1], np.diff(starts)
        numbers = np.empty(len(begin), np.int32)
        is_long = length > KEY_BYTES
        long, short = np.flatnonzero(is_long), np.flatnonzero(~is_long)
        numbers[long] = [self._number_long(pretoken) for pretoken in _slices(block, starts, long)]
        keys = _keys(block, begin[short], length[short])
        numbers[short] = found = self._find(keys)
        unknown = np.flatnonzero(found == UNKNOWN)
        while len(unknown):
            of_unknown = keys.at(unknown)
            new = np.sort(np.unique(of_unknown.hash, return_index=True)[1])
            self._add(of_unknown.at(new), _slices(block, starts, short[unknown[new]]))
            numbers[short[unknown]] = found = self._find(of_unknown)
            unknown = unknown[found == UNKNOWN]  # different pretokens of one hash come one after another
        return numbers

    def _number_long(self, pretoken: bytes) -> int:
        number = self._long.setdefault(pretoken, len(self.pretokens))
        if number == len(self.pretokens):
            self.pretokens.append(pretoken)
        return number

    def _find(self, keys: _Keys) -> Numbers:
        """Numbers of keys, UNKNOWN where they are not in the table."""
        slots = self._slot(keys)
        numbers = self._slots[slots]
        others = np.flatnonzero(self._differs(numbers, keys))
        while len(others):
            slots[others] = (slots[others] + 1) % len(self._slots)
            numbers[others] = self._slots[slots[others]]
            others = others[self._differs(numbers[others], keys.at(others))]
        return numbers

    def _differs(self, numbers: Numbers, keys: _Keys) -> NDArray[np.bool_]:
        """Where a slot is taken by another key."""
        same = (self._first[numbers] == keys.first) & (self._second[numbers] == keys.second)
        return ~same & (numbers != UNKNOWN)

    def _slot(self, keys: _Keys) -> NDArray[np.int64]:
        bits = len(self._slots).bit_length() - 1
        return (keys.hash >> np.uint64(64 - bits)).astype(np.int64)

    def _add(self, keys: _Keys, pretokens: list[bytes]) -> None:
        """Learn keys, all different and none known."""
        begin, end = len(self.pretokens), len(self.pretokens) + len(pretokens)
        self.pretokens += pretokens
        if end > len(self._first):
            self._first, self._second = (np.resize(array, 2 * end) for array in (self._first, self._second))
        self._first[begin:end], self._second[begin:end] = keys.first, keys.second
        if 3 * end < len(self._slots):
            self._place(keys, np.arange(begin, end, dtype=np.int32))
        else:
            self._slots = np.full(1 << (6 * end).bit_length(), UNKNOWN, np.int32)
            short = np.flatnonzero([len(p) <= KEY_BYTES for p in self.pretokens])
            first, second = self._first[short], self._second[short]
            self._place(_Keys(first, second, _hash(first, second)), short.astype(np.int32))

    def _place(self, keys: _Keys, numbers: Numbers) -> None:
        slots = self._slot(keys)
        while len(numbers):
            free = self._slots[slots] == UNKNOWN
            self._slots[slots[free]] = numbers[free]  # of several for one slot the last stays
            homeless = np.flatnonzero(self._slots[slots] != numbers)
            numbers, slots = numbers[homeless], (slots[homeless] + 1) % len(self._slots)


def _slices(block: bytes, starts: NDArray[np.int64], which: NDArray[np.int64]) -> list[bytes]:
    """The pretokens of these indices."""
    return [block[begin:end] for begin, end in zip(starts[which].tolist(), starts[which + 1].tolist(), strict=True)]


def _keys(block: bytes, begin: NDArray[np.int64], length: NDArray[np.int64]) -> _Keys:
    padded = np.frombuffer(block + bytes(2 * KEY_BYTES), np.uint8)
    words = np.ndarray((len(block) + KEY_BYTES,), "<u8", buffer=padded, strides=(1,))  # the word that begins at a byte
    first = words[begin] | PADDING[np.minimum(length, 8)]
    second = np.full(len(begin), PADDING[0])
    longer = np.flatnonzero(length > 8)
    second[longer] = words[begin[longer] + 8] | PADDING[length[longer] - 8]
    return _Keys(first, second, _hash(first, second))


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
    return _counter(table, counts)


def _counter(table: PretokenTable, counts: NDArray[np.int64]) -> PretokenCounts:
    """By pretoken, what is counted by number."""
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
    table, counts = PretokenTable(), np.zeros(0, np.int64)
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            numbers = table.number(arrays["pretokens"].tobytes())[::2]  # all different; between them are borders
            counts = np.pad(counts, (0, len(table.pretokens) - len(counts)))
            counts[numbers] += arrays["counts"]
    return _counter(table, counts)
