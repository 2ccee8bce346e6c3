"""Token files: each split's documents as one row of ids on disk, mapped into memory to read.

    <|endoftext|> first document <|endoftext|> second document … <|endoftext|>

`meta.json` next to them says how to read them and what they were made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.files import must_exist, read_json, sha256_file
from tinygpt.params import ParamsError, from_mapping
from tinygpt.paths import TOKENIZER_FILE

META_FILE = "meta.json"

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


def load_meta(folder: str | Path, *, tokenizer: Path | None = None) -> TokensMeta:
    """Read `meta.json`.

    Raises UserError when it is missing, not of this version, or not made with the tokenizer of the folder `tokenizer`.
    """
    path = Path(folder) / META_FILE
    try:
        meta = from_mapping(TokensMeta, read_json(path, stage="encode"))
    except ParamsError as error:
        raise UserError(
            f"{path} is not of this version ({'; '.join(error.problems)}): run `dvc repro encode`"
        ) from None
    if tokenizer is not None and sha256_file(tokenizer / TOKENIZER_FILE) != meta.tokenizer_sha256:
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
