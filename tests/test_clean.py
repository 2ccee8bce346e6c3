"""From data/raw to clean documents: each rule by hand, and the properties that hold for every text."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.corpus import documents
from tinygpt.corpus.clean import CONTROL, LEAST_TRAIN_BYTES, CleanParams, Cleaned, clean, clean_text
from tinygpt.corpus.documents import Reader
from tinygpt.corpus.duplicates import NearDuplicates, shingles
from tinygpt.corpus.jsonl import iter_texts, text_line
from tinygpt.corpus.raw import Manifest, RawFile, write_manifest
from tinygpt.errors import UserError
from tinygpt.params import ParamsError, from_mapping

OFF = {
    "separator": None,
    "newlines": False,
    "control_characters": False,
    "unicode_nfc": False,
    "min_bytes": 1,
    "exact_duplicates": False,
    "near_duplicates": None,
    "split": "tail",
    "val_fraction": 0.0,
    "test_fraction": 0.0,
    "split_seed": 0,
}
ON = {**OFF, "newlines": True, "control_characters": True, "unicode_nfc": True, "exact_duplicates": True}
PADDING = "".join(f"{i} is a number.\n" for i in range(100))  # enough text for a train split


def params(base: dict[str, object] = OFF, **changes: object) -> CleanParams:
    return from_mapping(CleanParams, {**base, **changes}, prefix="clean.")


def make_raw(folder: Path, files: dict[str, bytes], **changes: object) -> Path:
    """A raw folder as the download stage writes it; a file `val.txt` has the official split val, and so on."""
    raw = folder / "raw"
    entries = []
    for name, content in files.items():
        (raw / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "texts" / name).write_bytes(content)
        split = name.split(".")[0]
        entries.append(
            RawFile(
                name=name,
                url=None,
                bytes=len(content),
                sha256="",
                split=split if split in ("train", "val", "test") else None,
            )
        )
    manifest = {"source": "own", "licence": "", "separator": None, "document_start": None, "python": None}
    write_manifest(raw, Manifest(**{**manifest, **changes}, downloads=(), files=tuple(entries)))
    return raw


def run(folder: Path, files: dict[str, bytes], base: dict[str, object] = OFF, **changes: object) -> Cleaned:
    return clean(params(base, **changes), make_raw(folder, files), folder / "clean")


def split_texts(folder: Path, split: str = "train") -> list[str]:
    return list(iter_texts(folder / "clean" / f"{split}.jsonl"))


def read(folder: Path, content: bytes, *, newlines: bool = True, name: str = "x.txt", **manifest: object) -> list[str]:
    """The documents of one file."""
    raw = make_raw(folder, {name: content}, **manifest)
    manifest_read = documents.Manifest(**json.loads((raw / "manifest.json").read_text()))
    manifest_read = type(manifest_read)(
        **{**vars(manifest_read), "files": (RawFile(name=name, url=None, bytes=len(content), sha256="", split=None),)}
    )
    reader = Reader(raw, manifest_read, separator=None, newlines=newlines)
    return [document.text for document in reader.iter_documents(evaluation_first=False)]
