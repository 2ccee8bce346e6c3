"""Encode text in bulk: each different pretoken is merged once, the rest is look-ups in numpy arrays."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.jsonl import shard_texts
from tinygpt.files import atomic_write, sha256_file
from tinygpt.shards import Shard
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, iter_blocks
from tinygpt.tokenizer.pretokens import PretokenTable
from tinygpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

Ids = NDArray[np.unsignedinteger]

MAX_PRETOKENS = 1_000_000  # different pretokens remembered, about 150 MB; more of them start the table anew


class BulkEncoder:
    """The ids of `tokenizer`, for whole blocks of text.

    `encode(block)` takes blocks as iter_blocks gives them and returns ids of the tokenizer's dtype, its `border_ids`
    before each document.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._start()

    def _start(self) -> None:
        self._table = PretokenTable()
        self._table.number(DOCUMENT_BORDER)  # the first pretoken, so that it is never merged
        self._ids = np.array(self.tokenizer.border_ids, self.tokenizer.dtype)  # of all pretokens, one after the other
        self._begin, self._length = np.array([0]), np.array([len(self._ids)])  # where those of a pretoken are

    def encode(self, block: bytes) -> Ids:
        """Ids of a block of UTF-8."""
        if len(self._table.pretokens) > MAX_PRETOKENS:
            self._start()
        numbers = self._table.number(block)
        self._learn(self._table.pretokens[len(self._begin) :])
        length = self._length[numbers]
        end = np.cumsum(length)
        places = np.repeat(self._begin[numbers] - end + length, length)
        places += np.arange(len(places))
        return self._ids[places]

    def _learn(self, pretokens: list[bytes]) -> None:
        """Encode pretokens that have not come before."""
        ids, length = self.tokenizer.merger.merge_all(pretokens)
        self._begin = np.concatenate([self._begin, len(self._ids) + np.cumsum(length) - length])
        self._length = np.concatenate([self._length, length])
        self._ids = np.concatenate([self._ids, ids.astype(self._ids.dtype)])


def save_ids(shard: Shard, path: Path, *, tokenizer: Path) -> None:
    """Encode a shard of texts with a saved tokenizer into a file of ids, its `border_ids` before each text."""
    encoder = _encoder(tokenizer, sha256_file(tokenizer / TOKENIZER_FILE))
    with atomic_write(path, "wb") as file:
        for block in iter_blocks(shard_texts(shard)):
            file.write(encoder.encode(block).data)


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, sha256: str) -> BulkEncoder:
    """One encoder for all shards of a worker: what it learned from one serves the next."""
    return BulkEncoder(load_tokenizer(tokenizer))
