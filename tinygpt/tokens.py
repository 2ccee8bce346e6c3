"""Token files: each split's documents as one row of ids on disk, mapped into memory to read.

    <|endoftext|> first document <|endoftext|> second document … <|endoftext|>

`meta.json` next to them says how to read them and what they were made from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.files import must_exist, sha256_file, unchanged
from tinygpt.params import Count, Within, read_record
from tinygpt.paths import TOKENIZER_FILE
from tinygpt.tokenizer.tokenizer import load_tokenizer

META_FILE = "meta.json"

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

    Raises UserError when it is missing, of another version, or not made with the tokenizer in the folder `tokenizer`.
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

    Raises UserError when the file is missing, does not fit meta.json, or holds fewer than `at_least` ids. Every id is
    in the vocabulary: so readers need not check ids.
    """
    meta, path = load_meta(folder), Path(folder) / f"{split}.bin"
    n_tokens, dtype = meta.split(split).tokens, np.dtype(meta.dtype)
    unchanged(path, meta.split(split).sha256, stage="encode")
    fits = path.stat().st_size == n_tokens * dtype.itemsize
    if not fits or (n_tokens and np.memmap(path, dtype, "r").max() >= meta.vocab_size):
        raise UserError(f"{path} does not fit {META_FILE}: run `dvc repro -f -s encode`")
    if n_tokens < at_least:
        larger = "" if split == "train" else f", a larger clean.{split}_fraction"
        raise UserError(
            f"{path} has {n_tokens} tokens, at least {at_least} are needed: "
            f"use more text{larger} or a smaller model.block_size"
        )
    return np.memmap(path, dtype, "r")
