"""The folder data/raw: text files as they came, in `texts/`, and a manifest that says what they are."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tinygpt.errors import UserError
from tinygpt.files import read_json, sha256_file, write_json

MANIFEST = "manifest.json"
TEXTS = "texts"  # a subfolder, so that no text can take the manifest's name
SNIFF_BYTES = 65_536  # what is looked at to tell a text from a picture
MOST_INVALID = 0.1  # share of bytes that are no UTF-8; a Latin-1 text of French has about 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawFile:
    """One text file, named relative to `data/raw/texts`."""

    name: str
    url: str | None  # where it, or the archive that it came in, was downloaded; None for a local or embedded file
    bytes: int
    sha256: str
    split: str | None  # train, val or test where the source says so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in data/raw.  No times and no local paths, so the same source gives the same bytes."""

    source: str
    licence: str
    separator: str | None  # the text between two documents of a file; None = a file is one document
    document_start: str | None  # regular expression of the line that begins a document
    python: str | None  # the version whose documentation this is; None for other sources
    downloads: tuple[dict[str, str], ...]  # url and sha256 of each downloaded file, before unpacking
    files: tuple[RawFile, ...]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a raw folder."""
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read a raw folder's manifest.  Raises UserError when it is missing, broken or of another version."""
    document = read_json(folder / MANIFEST, stage="download")
    try:
        files = tuple(RawFile(**entry) for entry in document.pop("files"))
        return Manifest(**{**document, "downloads": tuple(document["downloads"]), "files": files})
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / MANIFEST} is not what download writes: run `dvc repro -f download`") from None


class RawFolder:
    """Copies texts into a raw folder, at most `max_bytes` of each official split, and remembers them."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.files: list[RawFile] = []
        self.skipped: list[str] = []  # names of files that are no text
        self._taken: dict[str | None, int] = {}  # split -> UTF-8 bytes of text so far

    def add(self, name: str, chunks: Iterator[bytes], *, url: str | None = None, split: str | None = None) -> None:
        """Copy one file, cut at the border of a document (.jsonl) or line when `max_bytes` is reached."""
        limit = None if self.max_bytes is None else self.max_bytes - self._taken.get(split, 0)
        head = next(chunks, b"")
        if limit == 0:
            return
        if not _is_text(head):
            self.skipped.append(name)
            return
        path = self._new_path(name)
        copy = _copy_jsonl if name.lower().endswith(".jsonl") else _copy_text
        with open(path, "wb") as file:
            taken = copy(file, _chain(head, chunks), limit, name)
        self._taken[split] = self._taken.get(split, 0) + taken
        file_bytes = path.stat().st_size
        self.files.append(RawFile(name=name, url=url, bytes=file_bytes, sha256=sha256_file(path), split=split))

    def _new_path(self, name: str) -> Path:
        path = self.folder / TEXTS / PurePosixPath(name)
        if path.exists():
            raise UserError(f"download.source holds two files of the name {name}: rename one")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _is_text(head: bytes) -> bool:
    sample = head[:SNIFF_BYTES]
    invalid = sample.decode("utf-8", "replace").count("\ufffd")
    return b"\0" not in sample and invalid <= 1 + MOST_INVALID * len(sample)  # 1: the character at the sample's end


def _copy_text(file: IO[bytes], chunks: Iterable[bytes], limit: int | None, name: str) -> int:
    """Copy whole lines up to `limit` bytes, or whole characters where the first line is longer.  -> bytes used of it"""
    size = border = 0
    last = b""
    for chunk in chunks:
        kept = chunk if limit is None else chunk[: limit - size]
        file.write(kept)
        border = size + newline + 1 if (newline := kept.rfind(b"\n")) >= 0 else border
        size += len(kept)
        last = (last + kept)[-4:]  # no character is longer
        if len(kept) < len(chunk):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(last)
            begun = len(decoder.getstate()[0])  # bytes of a character that is not whole
            file.truncate(border or size - begun)
            return limit or 0
    return size


def _copy_jsonl(file: IO[bytes], chunks: Iterable[bytes], limit: int | None, name: str) -> int:
    """Copy whole lines up to `limit` bytes of their texts.  -> bytes used of it"""
    if limit is None:
        return sum(file.write(chunk) for chunk in chunks)
    size = 0
    for number, line in enumerate(_lines(chunks), 1):
        size_with = size + _text_bytes(line, f"{name} line {number}")
        if size_with > limit:
            return limit
        size = size_with
        file.write(line)
    return size


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _text_bytes(line: bytes, where: str) -> int:
    try:
        return len(json.loads(line)["text"].encode("utf-8", "replace")) if line.strip() else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{where} is not a JSON object with a "text": mend the file or rename it to .txt') from None
