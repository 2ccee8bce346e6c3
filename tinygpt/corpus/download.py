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
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tinygpt.corpus.archive import iter_members
from tinygpt.corpus.fetch import NotThereError, check_sha256, fetch, fetch_bucket
from tinygpt.corpus.folders import TEXTS, Manifest, RawFile, text_line, write_manifest
from tinygpt.corpus.sources import EMBEDDED, DownloadParams, Remote, Source, find_source, iter_python_docs, suggestion
from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, sha256_file

SNIFF_BYTES = 65_536  # what is looked at to tell a text from a picture
MOST_INVALID = 0.1  # share of bytes that are not UTF-8; a Latin-1 text of French has about 0.04
MIRROR = "TINYGPT_MIRROR"  # environment: a folder or an http(s) address that is looked at first


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """What the stage says about its work."""

    manifest: Manifest
    skipped: tuple[str, ...]  # files that are not text


class SourceFile(NamedTuple):
    """A file of the source on this disk: `name` is what it is called in data/raw."""

    name: str
    path: Path
    url: str | None = None
    sha256: str | None = None  # where it was downloaded


def download(params: DownloadParams, raw: Path, *, root: Path, cache: Path) -> Downloaded:
    """Fill the folder `raw` from the source.

    `root` is the folder that local paths start from; `cache` keeps downloaded files, whole and partial ones.
    """
    source = find_source(params.source)
    with atomic_folder(raw) as folder:
        texts = RawFolder(folder, params.max_bytes)
        files = [] if source is EMBEDDED else _source_files(params, source, root, raw, cache)
        if source is EMBEDDED:
            _add_embedded(params, texts)
        for file in files:
            _add_members(file, source, texts)
        if not any(file.bytes for file in texts.files):
            skipped = f"; {len(texts.skipped)} of its files are not UTF-8 text" if texts.skipped else ""
            few = f" or raise download.max_bytes={params.max_bytes}" if params.max_bytes else ""
            raise UserError(f"download.source={params.source} holds no text{skipped}: name another file or folder{few}")
        manifest = Manifest(
            source=params.source,
            licence=source.licence,
            separator=source.separator,
            document_start=source.document_start,
            python=platform.python_version() if source is EMBEDDED else None,
            downloads=tuple({"url": file.url, "sha256": file.sha256} for file in files if file.url and file.sha256),
            files=tuple(texts.files),
        )
        write_manifest(folder, manifest)
    return Downloaded(manifest, tuple(texts.skipped))


def _add_embedded(params: DownloadParams, texts: RawFolder) -> None:
    content = "".join(map(text_line, iter_python_docs())).encode()
    check_sha256(hashlib.sha256(content).hexdigest(), params.sha256, "python-docs.jsonl")
    texts.add("python-docs.jsonl", iter([content]))


def _add_members(file: SourceFile, source: Source, texts: RawFolder) -> None:
    for name, chunks in iter_members(file.path, file.name):
        split = source.splits.get(PurePosixPath(name).name)
        if split or not source.splits:
            content = iter([source.extract(b"".join(chunks), name)]) if source.extract else chunks
            texts.add(name, content, url=file.url, split=split)


def _source_files(params: DownloadParams, source: Source, root: Path, raw: Path, cache: Path) -> list[SourceFile]:
    """The files of a source, checked, those on the web and in buckets after copying them."""
    found: list[tuple[str, Path]] = []
    if not source.remotes:
        is_address = "://" in params.source
        found = fetch_bucket(params.source, cache) if is_address else _local_files(params.source, root, raw)
    n_file = len(source.remotes or found)
    if params.sha256 and n_file > 1:
        raise UserError(f"download.sha256 must be null: {params.source} holds {n_file} files, not one")
    if params.sha256:
        for name, path in found:
            check_sha256(sha256_file(path), params.sha256, name)
    remote_files = [
        SourceFile(remote.name, *_obtain(remote, params.sha256 or remote.sha256, root, cache))
        for remote in source.remotes
    ]
    return remote_files + [SourceFile(name, path) for name, path in found]


def _obtain(remote: Remote, sha256: str | None, root: Path, cache: Path) -> tuple[Path, str, str]:
    """The remote file on this disk, from the mirror where that has it.  -> (path, url, hex SHA-256)"""
    mirror = os.environ.get(MIRROR, "")
    names = list(dict.fromkeys((remote.name, remote.url.rsplit("/", 1)[-1])))
    if mirror and "://" not in mirror:
        folder = root / Path(mirror).expanduser()
        if not folder.is_dir():
            raise UserError(f"{MIRROR}={mirror} is neither a folder nor an http(s) address: mend or unset it")
        for path in (folder / name for name in names):
            if path.is_file():
                return path, remote.url, check_sha256(sha256_file(path), sha256, str(path))
    # Two sources may use one base name, so the cache keeps their addresses apart.
    path = cache / f"{hashlib.sha256(remote.url.encode()).hexdigest()[:8]}-{remote.name}"
    if "://" in mirror:
        for name in names:
            try:
                return path, remote.url, fetch(f"{mirror.rstrip('/')}/{name}", path, sha256=sha256)
            except NotThereError:
                continue
    return path, remote.url, fetch(remote.url, path, sha256=sha256)


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
