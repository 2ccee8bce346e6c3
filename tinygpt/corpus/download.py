"""The download stage's work: from `download.source` to text files and a manifest in data/raw."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tinygpt.corpus.archive import iter_members
from tinygpt.corpus.bucket import fetch_bucket
from tinygpt.corpus.fetch import NotThereError, fetch
from tinygpt.corpus.jsonl import text_line
from tinygpt.corpus.python_docs import iter_python_docs, python_version
from tinygpt.corpus.raw import Manifest, RawFolder, write_manifest
from tinygpt.corpus.sources import (
    EMBEDDED,
    LOCAL,
    PYTHON_DOCS,
    DownloadParams,
    Remote,
    Source,
    remote_source,
    suggestion,
)
from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, sha256_file

MIRROR = "TINYGPT_MIRROR"  # environment: a folder or an http(s) address that is looked at first


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """What the stage tells about its work."""

    manifest: Manifest
    skipped: tuple[str, ...]  # files that are no text


def download(params: DownloadParams, raw: Path, *, root: Path, cache: Path) -> Downloaded:
    """Fill the folder `raw` from the source.

    `root` is the folder that local paths start from; `cache` keeps downloaded files, whole and partial ones.
    """
    downloads: list[dict[str, str]] = []
    with atomic_folder(raw) as folder:
        texts = RawFolder(folder, params.max_bytes)
        source = remote_source(params.source)
        if params.source == PYTHON_DOCS:
            source = EMBEDDED
            _embedded(params, texts)
        elif source:
            downloads = _remote(params, source, texts, root, cache)
        else:
            source = LOCAL
            is_address = "://" in params.source
            files = fetch_bucket(params.source, cache) if is_address else _local_files(params.source, root, raw)
            _add_files(params, texts, files)
        if not any(file.bytes for file in texts.files):
            skipped = f"; {len(texts.skipped)} of its files are no UTF-8 text" if texts.skipped else ""
            few = f" or raise download.max_bytes={params.max_bytes}" if params.max_bytes else ""
            raise UserError(f"download.source={params.source} holds no text{skipped}: name another file or folder{few}")
        manifest = Manifest(
            source=params.source,
            licence=source.licence,
            separator=source.separator,
            document_start=source.document_start,
            python=python_version() if source is EMBEDDED else None,
            downloads=tuple(downloads),
            files=tuple(texts.files),
        )
        write_manifest(folder, manifest)
    return Downloaded(manifest, tuple(texts.skipped))


def _embedded(params: DownloadParams, texts: RawFolder) -> None:
    content = "".join(map(text_line, iter_python_docs())).encode()
    _check_sha256(hashlib.sha256(content).hexdigest(), params.sha256, "python-docs.jsonl")
    texts.add("python-docs.jsonl", iter([content]))


def _remote(params: DownloadParams, source: Source, texts: RawFolder, root: Path, cache: Path) -> list[dict[str, str]]:
    """Copy the texts of a source on the web.  -> url and sha256 of each file downloaded"""
    if params.sha256 and len(source.remotes) > 1:
        raise UserError(f"download.sha256 must be null: {params.source} has {len(source.remotes)} files, not one")
    downloads = []
    for remote in source.remotes:
        path, sha256 = _obtain(remote, params.sha256 or remote.sha256, root, cache)
        downloads.append({"url": remote.url, "sha256": sha256})
        for name, chunks in iter_members(path, remote.name):
            split = source.splits.get(PurePosixPath(name).name)
            if split or not source.splits:
                content = iter([source.extract(b"".join(chunks), name)]) if source.extract else chunks
                texts.add(name, content, url=remote.url, split=split)
    return downloads


def _obtain(remote: Remote, sha256: str | None, root: Path, cache: Path) -> tuple[Path, str]:
    """The remote file on this disk, from the mirror where that has it.  -> (path, hex SHA-256)"""
    mirror = os.environ.get(MIRROR, "")
    names = list(dict.fromkeys((remote.name, remote.url.rsplit("/", 1)[-1])))
    if mirror and "://" not in mirror:
        folder = root / Path(mirror).expanduser()
        if not folder.is_dir():
            raise UserError(f"{MIRROR}={mirror} is no folder and no http(s) address: mend or unset it")
        for path in (folder / name for name in names):
            if path.is_file():
                return path, _check_sha256(sha256_file(path), sha256, str(path))
    # Two sources may use one base name, so the cache tells their addresses apart.
    path = cache / f"{hashlib.sha256(remote.url.encode()).hexdigest()[:8]}-{remote.name}"
    if "://" in mirror:
        for name in names:
            try:
                return path, fetch(f"{mirror.rstrip('/')}/{name}", path, sha256=sha256)
            except NotThereError:
                continue
    return path, fetch(remote.url, path, sha256=sha256)


def _add_files(params: DownloadParams, texts: RawFolder, files: list[tuple[str, Path]]) -> None:
    if params.sha256 and len(files) > 1:
        raise UserError(f"download.sha256 must be null: {params.source} holds {len(files)} files, not one")
    for name, path in files:
        if params.sha256:
            _check_sha256(sha256_file(path), params.sha256, name)
        for member, chunks in iter_members(path, name):
            texts.add(member, chunks)


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
            f"download.source={source} is no known source and no file: looked for {path}{suggestion(source)}"
        )
    files = sorted((file.relative_to(base).as_posix(), file) for file in found if file.is_file())
    if not files:
        raise UserError(f"download.source={source} names no files: looked for {path}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for here, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _check_sha256(found: str, expected: str | None, name: str) -> str:
    if expected not in (None, found):
        raise UserError(
            f"{name} has sha256 {found}, expected {expected}: its bytes are not the right ones, or have changed"
        )
    return found
