"""The download stage's work: from `download.source` to text files and a manifest in data/raw."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tinygpt.corpus.archive import TARS, UnpackError, iter_members
from tinygpt.corpus.fetch import check_sha256
from tinygpt.corpus.folders import TEXTS, Manifest, RawFile, text_line, write_manifest
from tinygpt.corpus.remote import SourceFile, bucket_files, local_file, web_file
from tinygpt.corpus.sources import EMBEDDED, DownloadParams, Source, find_source, iter_python_docs, suggestion
from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, sha256_file

SNIFF_BYTES = 65_536  # what is looked at to tell a text from a picture
MOST_INVALID = 0.1  # share of bytes that are not UTF-8; a Latin-1 text of French has about 0.04


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """What the stage says about its work."""

    manifest: Manifest
    skipped: tuple[str, ...]  # files that are not text


class _NeedMoreError(Exception):
    """The beginning of a file does not hold all the text that is asked for."""


def download(params: DownloadParams, raw: Path, *, root: Path, cache: Path) -> Downloaded:
    """Fill the folder `raw` from the source.

    `root` is the folder that local paths start from; `cache` keeps downloaded files, whole and partial ones. Of a file
    that can be read from its beginning, no more is transferred than `max_bytes` of text need.
    """
    beginnings: dict[str, int] = {}  # bytes of the files of which more is needed than at first
    while True:
        try:
            return _fill(params, raw, root, cache, beginnings)
        except _NeedMoreError:
            continue


def _fill(params: DownloadParams, raw: Path, root: Path, cache: Path, beginnings: dict[str, int]) -> Downloaded:
    source = find_source(params.source)
    with atomic_folder(raw) as folder:
        texts = RawFolder(folder, params.max_bytes)
        files = [] if source is EMBEDDED else _source_files(params, source, root, raw, cache)
        if source is EMBEDDED:
            _add_embedded(params, texts)
        downloads = [_add_file(file, params, source, texts, beginnings) for file in files]
        if not any(file.bytes for file in texts.files):
            for file in files:
                file.forget()
            skipped = f"; {len(texts.skipped)} of its files are not UTF-8 text" if texts.skipped else ""
            few = f" or raise download.max_bytes={params.max_bytes}" if params.max_bytes else ""
            raise UserError(f"download.source={params.source} holds no text{skipped}: name another file or folder{few}")
        manifest = Manifest(
            source=params.source,
            licence=source.licence,
            separator=source.separator,
            document_start=source.document_start,
            python=platform.python_version() if source is EMBEDDED else None,
            downloads=tuple(download for download in downloads if download["url"]),
            files=tuple(texts.files),
        )
        write_manifest(folder, manifest)
    return Downloaded(manifest, tuple(texts.skipped))


def _add_embedded(params: DownloadParams, texts: RawFolder) -> None:
    content = "".join(map(text_line, iter_python_docs())).encode()
    check_sha256(hashlib.sha256(content).hexdigest(), params.sha256, "python-docs.jsonl")
    texts.add("python-docs.jsonl", iter([content]))


def _add_file(
    file: SourceFile, params: DownloadParams, source: Source, texts: RawFolder, beginnings: dict[str, int]
) -> dict[str, str | None]:
    """Add the texts of a file, from its beginning where that holds enough.  -> its address, and its hash if it is read

    The hash is left out where the file is longer than its beginning, whether or not more of it is there by chance.
    """
    splits = {source.splits[file.name]} if file.name in source.splits else set(source.splits.values())
    first = None if source.extract else file.first_bytes(params.max_bytes)
    if texts.is_full(splits):
        return {"url": file.url, "sha256": None}
    path, is_whole = file.get(first and max(first, beginnings.get(file.name, 0)))
    if file.sha256:
        check_sha256(sha256_file(path), file.sha256, str(path))
    try:
        _add_members(file, path, is_whole, source, splits, texts)
    except (UnpackError, _NeedMoreError):
        if is_whole:
            file.forget()
            raise
        beginnings[file.name] = 2 * path.stat().st_size
        raise _NeedMoreError from None
    is_read = is_whole and (first is None or path.stat().st_size < first)
    return {"url": file.url, "sha256": sha256_file(path) if file.url and is_read else None}


def _add_members(
    file: SourceFile, path: Path, is_whole: bool, source: Source, splits: set[str], texts: RawFolder
) -> None:
    is_cut = not is_whole and not file.name.lower().endswith(TARS)  # a tar says how long its members are
    for name, chunks in iter_members(path, file.name):
        split = source.splits.get(PurePosixPath(name).name)
        if texts.is_full(splits):
            return
        if split or not source.splits:
            content = iter([source.extract(b"".join(chunks), name)]) if source.extract else chunks
            texts.add(name, itertools.chain(content, _need_more() if is_cut else ()), url=file.url, split=split)
    if not (is_whole or is_cut or texts.is_full(splits)):
        raise _NeedMoreError


def _need_more() -> Iterator[bytes]:
    raise _NeedMoreError
    yield


def _source_files(params: DownloadParams, source: Source, root: Path, raw: Path, cache: Path) -> list[SourceFile]:
    """The files of a source, of which those on the web and in buckets are still to be copied."""
    if source.remotes:
        files = [web_file(remote, params, root, cache) for remote in source.remotes]
    elif "://" in params.source:
        files = bucket_files(params, cache)
    else:
        found = _local_files(params.source, root, raw)
        files = [local_file(name, path, params) for name, path in found]
    if params.sha256 and len(files) > 1:
        raise UserError(f"download.sha256 must be null: {params.source} holds {len(files)} files, not one")
    return files


def _local_files(source: str, root: Path, raw: Path) -> list[tuple[str, Path]]:
    """(name, path) of each file, sorted by name; the name is relative to the folder or to the glob's fixed part."""
    path = root / Path(source).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        if raw.resolve().is_relative_to(path.resolve()):
            raise UserError(f"download.source={source} holds {raw} itself: put the texts into a folder of their own")
        base, found = path, _walk(path)
    elif glob.has_magic(source):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).expanduser().parts)
        base = root.joinpath(*fixed)
        found = base.glob(str((root / Path(source).expanduser()).relative_to(base)))
    else:
        raise UserError(
            f"download.source={source} is neither a known source nor a file: looked for {path}{suggestion(source)}"
        )
    files = sorted((file.relative_to(base).as_posix(), file) for file in found if file.is_file())
    if not files:
        raise UserError(f"download.source={source} names no files: looked for {path}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for here, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


class RawFolder:
    """Copies texts into a raw folder, at most `max_bytes` of each official split, and remembers them."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.files: list[RawFile] = []
        self.skipped: list[str] = []  # names of files that are not text
        self._taken: dict[str | None, int] = {}  # split -> UTF-8 bytes of text so far

    def is_full(self, splits: Collection[str]) -> bool:
        """Whether these splits, or the texts without one, have `max_bytes`, so that nothing further is read."""
        taken = [self._taken.get(split, 0) for split in splits or (None,)]
        return self.max_bytes is not None and min(taken) >= self.max_bytes

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
            taken = copy(file, itertools.chain([head], chunks), limit, name)
        self._taken[split] = self._taken.get(split, 0) + taken
        file_bytes = path.stat().st_size
        self.files.append(RawFile(name=name, url=url, bytes=file_bytes, sha256=sha256_file(path), split=split))

    def _new_path(self, name: str) -> Path:
        path = self.folder / TEXTS / PurePosixPath(name)
        if path.exists():
            raise UserError(f"download.source holds two files of the name {name}: rename one")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


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
