"""How often each pretoken occurs in a text: all that BPE learns from."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tinygpt.corpus.jsonl import shard_texts
from tinygpt.files import atomic_write
from tinygpt.shards import Shard
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, iter_blocks
from tinygpt.tokenizer.pretokens import PretokenTable

PretokenCounts = Counter[bytes]

MAX_PRETOKENS = 1_000_000  # different pretokens remembered from earlier shards, about 150 MB


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
