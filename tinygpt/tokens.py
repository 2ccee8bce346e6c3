"""Token files: each split's documents as one row of ids on disk, mapped into memory to read.

    <|endoftext|> first document <|endoftext|> second document … <|endoftext|>

`meta.json` beside them says how to read them and what they were made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, must_exist, read_json, sha256_file
from tinygpt.params import ParamsError, from_mapping
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

SPLITS = ("train", "val", "test")
META_FILE = "meta.json"

PIECE = 1 << 20  # ids looked up at a time, so that memory does not grow with a part

TokenIds = NDArray[np.unsignedinteger]


@dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """One token file."""

    tokens: int  # ids in the file, <|endoftext|> included
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text, the unit of bits per byte
    sha256: str  # of the file


@dataclass(frozen=True, kw_only=True)
class TokensMeta:
    """All token files of a folder."""

    dtype: str  # "<u2" or "<u4", little-endian
    vocab_size: int  # every id is below it
    eos_id: int  # the id of <|endoftext|>
    tokenizer_sha256: str  # of the tokenizer.json that made them
    train: SplitMeta
    val: SplitMeta
    test: SplitMeta

    def split(self, name: str) -> SplitMeta:
        """The entry of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def write_tokens(path: Path, parts: Iterable[TokenIds], tokenizer: Tokenizer) -> SplitMeta:
    """Write parts of ids, `<|endoftext|>` before each document, into one token file."""
    sizes = np.array(tokenizer.token_bytes, np.uint32)
    n_documents = n_bytes = n_tokens = 0
    digest = hashlib.sha256()
    with atomic_write(path, "wb") as file:
        for ids in parts:
            file.write(ids.data)
            digest.update(ids.data)
            n_tokens += len(ids)
            n_bytes += sum(int(sizes[some].sum()) for some in np.array_split(ids, 1 + len(ids) // PIECE))
            n_documents += int(np.count_nonzero(ids == tokenizer.eos_id))
        if n_documents:
            last = np.array([tokenizer.eos_id], tokenizer.dtype)
            file.write(last.data)
            digest.update(last.data)
            n_tokens += 1
    return SplitMeta(tokens=n_tokens, documents=n_documents, bytes=n_bytes, sha256=digest.hexdigest())


def load_meta(folder: str | Path, *, tokenizer: Path | None = None) -> TokensMeta:
    """Read `meta.json`.

    Raises UserError when it is missing, not of this version, or, if `tokenizer` is given, another one made the tokens.
    """
    path = Path(folder) / META_FILE
    try:
        meta = from_mapping(TokensMeta, read_json(path, stage="encode"))
    except ParamsError as error:
        raise UserError(
            f"{path} is not of this version ({'; '.join(error.problems)}): run `dvc repro encode`"
        ) from None
    if tokenizer is not None and sha256_file(tokenizer_file(tokenizer)) != meta.tokenizer_sha256:
        raise UserError(f"{folder} was not made with the tokenizer in {tokenizer}: run `dvc repro encode`")
    return meta


def load_tokens(folder: str | Path, split: str, *, at_least: int = 1) -> TokenIds:
    """Map a split's ids for reading.

    Raises UserError when the file is missing, is not as long as meta.json says, or holds fewer than `at_least` ids.
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
    return np.memmap(path, dtype=np.dtype(meta.dtype), mode="r", shape=(n_tokens,))
