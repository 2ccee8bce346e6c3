"""Token files: each split's documents as one row of ids on disk, written in bulk and mapped into memory to read.

    <|endoftext|> first document <|endoftext|> second document … <|endoftext|>

`meta.json` next to them says how to read them and what they were made from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.folders import SPLITS, cut_lines, shard_texts, split_file
from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, atomic_write, must_exist, sha256_file, write_json
from tinygpt.params import Count, Within, read_record
from tinygpt.paths import TOKENIZER_FILE
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import Shard, shard_results
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, iter_blocks
from tinygpt.tokenizer.pretokens import MAX_PRETOKENS, PretokenTable
from tinygpt.tokenizer.tokenizer import Tokenizer, load_tokenizer

META_FILE = "meta.json"
PIECE = 1 << 20  # ids worked on together, so that memory does not grow with a file

TokenIds = NDArray[np.unsignedinteger]
Number = Annotated[int, Within("[0, inf)")]
IdType = Literal["<u2", "<u4"]  # little-endian


@dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """One token file."""

    tokens: Number  # ids in the file, <|endoftext|> included
    documents: Number
    bytes: Number  # UTF-8 bytes of the documents' text, the unit of bits per byte
    sha256: str  # of the file


@dataclass(frozen=True, kw_only=True)
class TokensMeta:
    """All token files of a folder."""

    dtype: IdType
    vocab_size: Count  # every id is below it
    eos_id: Number  # the id of <|endoftext|>
    tokenizer_sha256: str  # of the tokenizer.json that made them
    train: SplitMeta
    val: SplitMeta
    test: SplitMeta

    def split(self, name: str) -> SplitMeta:
        """The entry of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def load_meta(folder: str | Path, *, tokenizer: Path | None = None) -> TokensMeta:
    """Read `meta.json`.

    Raises UserError when it is missing, of another version, or not made with the tokenizer of the folder `tokenizer`.
    """
    meta = read_record(TokensMeta, Path(folder) / META_FILE, stage="encode")
    if tokenizer is not None and (
        sha256_file(must_exist(tokenizer / TOKENIZER_FILE, stage="train_tokenizer")) != meta.tokenizer_sha256
        or load_tokenizer(tokenizer).vocab_size != meta.vocab_size
    ):
        raise UserError(f"{folder} was not made with the tokenizer in {tokenizer}: run `dvc repro encode`")
    return meta


def load_tokens(folder: str | Path, split: str, *, at_least: int = 1) -> TokenIds:
    """Map a split's ids for reading.

    Raises UserError when the file is missing, has not the length or the SHA-256 that meta.json says, holds fewer than
    `at_least` ids, or one that is not in the vocabulary: so readers need not check ids.
    """
    meta, path = load_meta(folder), must_exist(Path(folder) / f"{split}.bin", stage="encode")
    n_tokens, found = meta.split(split).tokens, path.stat().st_size
    if found != n_tokens * np.dtype(meta.dtype).itemsize:
        raise UserError(f"{path} has {found} bytes, meta.json promises {n_tokens} tokens: run `dvc repro encode`")
    if n_tokens < at_least:
        larger = "" if split == "train" else f", a larger clean.{split}_fraction"
        raise UserError(
            f"{path} has {n_tokens} tokens, at least {at_least} are needed: "
            f"take more text{larger} or a smaller model.block_size"
        )
    if sha256_file(path) != meta.split(split).sha256:  # the disk's doing, say, which DVC does not look for
        raise UserError(f"{path} is damaged, meta.json promises another SHA-256: run `dvc repro -f -s encode`")
    ids = np.memmap(path, dtype=np.dtype(meta.dtype), mode="r", shape=(n_tokens,))
    highest = max(int(ids[start : start + PIECE].max()) for start in range(0, n_tokens, PIECE))
    if highest >= meta.vocab_size:
        raise UserError(f"{path} has the id {highest}, of {meta.vocab_size} tokens: run `dvc repro encode`")
    return ids


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
    with atomic_folder(tokens) as folder:
        splits = {}
        for split in SPLITS:
            file = split_file(clean, split)
            key = [sha256_file(file), tokenizer_sha256]
            with results(work, cut_lines(file), name=f"encode-{split}", key=key) as paths:
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
    """One encoder for all shards of a worker: what it learned from one serves the next."""
    return BulkEncoder(load_tokenizer(tokenizer))


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
        """Encode pretokens that have not come before."""
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
            n_bytes += sum(int(sizes[some].sum()) for some in np.array_split(ids, 1 + len(ids) // PIECE))
            n_documents += int(np.count_nonzero(ids == tokenizer.eos_id))
        if n_documents:
            file.write(np.array([tokenizer.eos_id], tokenizer.dtype).data)
            n_tokens += 1
    return SplitMeta(tokens=n_tokens, documents=n_documents, bytes=n_bytes, sha256=sha256_file(path))
