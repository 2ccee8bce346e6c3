"""From texts to token files: each different pretoken is merged once, and the rest is look-ups in numpy arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np

from tinygpt.corpus.folders import SPLITS, cut_lines, shard_texts, split_file
from tinygpt.files import atomic_folder, atomic_write, sha256_file, write_json
from tinygpt.paths import TOKENIZER_FILE
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import Shard, shard_results
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, MAX_PRETOKENS, PretokenTable, iter_blocks
from tinygpt.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokens import META_FILE, IdType, SplitMeta, TokenIds, TokensMeta


def encode_corpus(
    clean: Path, tokenizer_folder: Path, tokens: Path, runtime: RuntimeParams, *, runs: Path | None = None
) -> TokensMeta:
    """Fill the folder `tokens` with train.bin, val.bin, test.bin and meta.json; `runs` is as in shard_results.

    Raises UserError where the texts or the tokenizer are missing or broken.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer_sha256 = sha256_file(tokenizer_folder / TOKENIZER_FILE)
    work = functools.partial(save_ids, tokenizer=tokenizer_folder.absolute())
    results = functools.partial(shard_results, code=__name__, runtime=runtime, runs=runs)
    with ExitStack() as shards, atomic_folder(tokens) as folder:  # shards of all splits stay until it is done
        splits = {}
        for split in SPLITS:
            file = split_file(clean, split)
            key = [sha256_file(file), tokenizer_sha256]
            paths = shards.enter_context(results(work, cut_lines(file), name=f"encode-{split}", key=key))
            parts = (np.fromfile(path, tokenizer.dtype) for path in paths)
            splits[split] = write_tokens(folder / f"{split}.bin", parts, tokenizer)
        meta = TokensMeta(
            dtype=cast(IdType, tokenizer.dtype.str),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer_sha256,
            **splits,
        )
        write_json(folder / META_FILE, dataclasses.asdict(meta))
    return meta


def save_ids(shard: Shard, path: Path, *, tokenizer: Path) -> None:
    """Encode a shard of texts with a saved tokenizer into a file of ids, its `border_ids` before each text."""
    encoder = _encoder(tokenizer, sha256_file(tokenizer / TOKENIZER_FILE))
    with atomic_write(path, "wb") as file:
        for block in iter_blocks(shard_texts(shard)):
            file.write(encoder.encode(block).data)


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, sha256: str) -> BulkEncoder:
    """One encoder for all shards of a worker: pretokens learned from one shard serve the next."""
    return BulkEncoder(load_tokenizer(tokenizer))


class BulkEncoder:
    """Encodes whole blocks of text into the ids of `tokenizer`.

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
        self._begin, self._length = np.array([0]), np.array([len(self._ids)])  # where each pretoken's ids are

    def encode(self, block: bytes) -> TokenIds:
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
        """Encode pretokens that are new."""
        ids, length = self.tokenizer.merger.merge_all(pretokens)
        self._begin = np.concatenate([self._begin, len(self._ids) + np.cumsum(length) - length])
        self._length = np.concatenate([self._length, length])
        self._ids = np.concatenate([self._ids, ids.astype(self._ids.dtype)])


def write_tokens(path: Path, parts: Iterable[TokenIds], tokenizer: Tokenizer) -> SplitMeta:
    """Write parts of ids, `<|endoftext|>` before each document, into one token file."""
    sizes = np.array(tokenizer.token_bytes, np.uint32)
    n_documents = n_bytes = n_tokens = 0
    with atomic_write(path, "wb") as file:
        for ids in parts:
            file.write(ids.data)
            n_tokens += len(ids)
            n_bytes += int(sizes[ids].sum())
            n_documents += int(np.count_nonzero(ids == tokenizer.eos_id))
        if n_documents:
            file.write(np.array([tokenizer.eos_id], tokenizer.dtype).data)
            n_tokens += 1
    return SplitMeta(tokens=n_tokens, documents=n_documents, bytes=n_bytes, sha256=sha256_file(path))
