"""The different pretokens of a text, numbered, and how often each occurs."""

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

MAX_PRETOKENS = 1_000_000  # different pretokens remembered, about 200 MB; more of them start the table anew
KEY_BYTES = 16  # pretokens up to this length are found by arrays, longer ones (about 1 in 100) by a dict
# By number of bytes: the bits after them in a little-endian word. No UTF-8 has 0xFF, so different pretokens stay so.
PADDING = np.array([2**64 - 2 ** (8 * n) for n in range(9)], np.uint64)
# Odd and without pattern: the golden ratio's and sqrt(2)'s digits.
FACTORS = np.array([0x9E3779B97F4A7C15, 0x6A09E667F3BCC909], np.uint64)


class PretokenTable:
    """Different pretokens, numbered in the order in which they first came; `pretokens[number]` is its bytes.

    Numbers are exact: pretokens of one hash are compared.
    """

    def __init__(self) -> None:
        self.pretokens: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, block: bytes) -> Numbers:
        """The number of each pretoken of a block (as iter_blocks gives it), in their order; it learns the new ones."""
        starts = pretoken_starts(block)
        numbers = np.empty(len(starts) - 1, np.int32)
        short = np.flatnonzero(np.diff(starts) <= KEY_BYTES)
        first, second = _words(block, starts[short], starts[short + 1])
        _, example, which = np.unique(_hash(first, second), return_index=True, return_inverse=True)
        in_order = np.argsort(example)
        found = np.empty(len(example), np.int32)
        found[in_order] = self._number_each(block, starts, short[example[in_order]])
        numbers[short] = found[which]
        alone = np.ones(len(numbers), np.bool_)  # those that are long, or differ from the example of their hash
        alone[short] = (first != first[example][which]) | (second != second[example][which])
        numbers[alone] = self._number_each(block, starts, np.flatnonzero(alone))
        return numbers

    def _number_each(self, block: bytes, starts: NDArray[np.int64], which: NDArray[np.int64]) -> list[int]:
        found = []
        for begin, end in zip(starts[which].tolist(), starts[which + 1].tolist(), strict=True):
            pretoken = block[begin:end]
            number = self._numbers.setdefault(pretoken, len(self.pretokens))
            if number == len(self.pretokens):
                self.pretokens.append(pretoken)
            found.append(number)
        return found


def _words(block: bytes, begin: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[Words, Words]:
    """Each pretoken as two words."""
    padded = np.frombuffer(block + bytes(2 * KEY_BYTES), np.uint8)
    words = np.ndarray((len(block) + KEY_BYTES,), "<u8", buffer=padded, strides=(1,))  # the word that begins at a byte
    length = end - begin
    first = words[begin] | PADDING[np.minimum(length, 8)]
    second = np.full(len(begin), PADDING[0])
    longer = np.flatnonzero(length > 8)
    second[longer] = words[begin[longer] + 8] | PADDING[length[longer] - 8]
    return first, second


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
    found = Counter({table.pretokens[i]: int(counts[i]) for i in np.flatnonzero(counts)})
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
    found: PretokenCounts = Counter()
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            counts = arrays["counts"].tolist()
            if counts:
                pretokens = arrays["pretokens"].tobytes().split(DOCUMENT_BORDER)
                found.update(dict(zip(pretokens, counts, strict=True)))
    return found
