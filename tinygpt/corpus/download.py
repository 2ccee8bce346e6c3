"""The download stage: from `download.source` to text files and a manifest in data/raw."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from tinygpt.corpus.archive import READ_WHOLE, READERS, TARS, UnpackError, iter_members
from tinygpt.corpus.fetch import CHUNK_BYTES, NotThereError, cache_name, check_sha256, fetch, forget
from tinygpt.corpus.folders import Manifest, RawDownload, text_line, write_manifest
from tinygpt.corpus.local import LEFT_OUT, Note, Notes, local_files
from tinygpt.corpus.raw import RawFolder
from tinygpt.corpus.sources import EMBEDDED, DownloadParams, Remote, Source, find_source, iter_python_docs
from tinygpt.errors import UserError
from tinygpt.files import alone, atomic_folder, naming, sha256_file
from tinygpt.progress import progress

MIRROR = "TINYGPT_MIRROR"  # environment variable: a folder or an http(s) address to try first
LEAST_BYTES = 131_072  # the least to read of a file: enough to distinguish a text from a picture


class Downloaded(NamedTuple):
    """What the stage reports."""

    manifest: Manifest
    notes: Notes


class _NeedMoreError(Exception):
    """The beginning of a file holds less text than was asked for."""


def download(params: DownloadParams, raw: Path, *, root: Path, cache: Path) -> Downloaded:
    """Fill the folder `raw` from the source.

    Local paths are relative to `root`; `cache` keeps downloaded files, whole and partial. If a file can be read from
    its beginning, only as much of it is transferred as `max_bytes` of text require.
    """
    source, more = find_source(params.source), 1
    held: AbstractContextManager[None] = nullcontext()
    if source.remotes or (source is not EMBEDDED and "://" in params.source):
        cache.parent.mkdir(parents=True, exist_ok=True)
        held = alone(cache.with_name(f"{cache.name}.lock"), "download")  # two would append to one partial download
    with held:
        while True:
            try:
                return _fill(params, source, raw, root, cache, more)
            except _NeedMoreError:
                more *= 2


def _fill(params: DownloadParams, source: Source, raw: Path, root: Path, cache: Path, more: int) -> Downloaded:
    """Fill `raw` once, from beginnings that are `more` times as long as they were at first."""
    with atomic_folder(raw) as folder:
        texts = RawFolder(folder, params.max_bytes, params.encoding)
        files = [] if source is EMBEDDED else _source_files(params, source, root, raw, cache, texts.notes.add)
        if source is EMBEDDED:
            content = "".join(map(text_line, iter_python_docs())).encode()
            check_sha256(hashlib.sha256(content).hexdigest(), params.sha256, "python-docs.jsonl")
            texts.add("python-docs.jsonl", iter([content]))
        digests = [_add_file(file, source, texts, more) for file in files]
        if not any(file.bytes for file in texts.files):
            for file in files:
                file.forget()
            why = f" ({texts.notes})" if texts.notes.names else ""
            few = f", or raise download.max_bytes={params.max_bytes}" if params.max_bytes else ""
            found = "holds no text" if files or why else "matches no files"
            raise UserError(f"download.source={params.source} {found}{why}: choose another file or folder{few}")
        manifest = Manifest(
            source=params.source,
            licence=source.licence,
            separator=source.separator,
            document_start=source.document_start,
            python=platform.python_version() if source is EMBEDDED else None,
            downloads=tuple(
                RawDownload(url=file.url, sha256=digest)
                for file, digest in zip(files, digests, strict=True)
                if file.url
            ),
            files=tuple(texts.files),
        )
        write_manifest(folder, manifest)
    return Downloaded(manifest, texts.notes)


def _add_file(file: SourceFile, source: Source, texts: RawFolder, more: int) -> str | None:
    """Add the texts of a file, from its beginning if that is enough.  -> the hash of a download that was read whole

    There is none if the beginning was enough, even if the whole file happens to be there.
    """
    splits = {source.splits[file.name]} if file.name in source.splits else set(source.splits.values())
    if texts.is_full(splits):
        return None
    name, first, max_bytes = file.name.lower(), None, texts.max_bytes
    if not (max_bytes is None or file.sha256 or source.extract or name.endswith(READ_WHOLE)):
        first = max(LEAST_BYTES, max_bytes // 4 if name.endswith(tuple(READERS)) else max_bytes + 1)
    path, is_whole = file.get(first and first * more)
    digest = sha256_file(path) if file.sha256 else None
    check_sha256(digest, file.sha256, str(path))
    try:
        _add_members(file, path, is_whole, source, splits, texts)
    except (UnpackError, _NeedMoreError):
        if is_whole:
            file.forget()
            raise
        raise _NeedMoreError from None
    is_read = is_whole and (first is None or path.stat().st_size < first)
    return digest or sha256_file(path) if file.url and is_read else None


def _add_members(
    file: SourceFile, path: Path, is_whole: bool, source: Source, splits: set[str], texts: RawFolder
) -> None:
    is_cut = not is_whole and not file.name.lower().endswith(TARS)  # a tar says how long its members are
    for name, chunks in iter_members(path, file.name, texts.notes.add):
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


def _source_files(
    params: DownloadParams, source: Source, root: Path, raw: Path, cache: Path, note: Note
) -> list[SourceFile]:
    """The files of a source; those on the web or in a bucket are not fetched yet."""
    if source.remotes:
        files = [web_file(remote, params, root, cache) for remote in source.remotes]
    elif "://" in params.source:
        files = [*bucket_files(params, cache, note)]
    else:
        found = local_files(params.source, root, raw, note)
        files = [SourceFile(name, params.sha256, functools.partial(_whole, path)) for name, path in found]
    if params.sha256 and len(files) > 1:
        raise UserError(f"download.sha256 must be null: {params.source} holds {len(files)} files, not one")
    return files


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is its name in data/raw."""

    name: str
    sha256: str | None  # what it must hash to
    get: Callable[[int | None], tuple[Path, bool]]  # (bytes needed, None = all) -> (path, whether it is whole)
    url: str | None = None
    cached: Path | None = None  # where `get` downloads it to

    def forget(self) -> None:
        """Remove a download that turned out bad, or it would be used again; one with the right hash stays."""
        if self.cached and not self.sha256:
            forget(self.cached)


def _whole(path: Path, _: int | None) -> tuple[Path, bool]:
    return path, True


def web_file(remote: Remote, params: DownloadParams, root: Path, cache: Path) -> SourceFile:
    """A file from the mirror, or else from the web."""
    sha256, cached = params.sha256 or remote.sha256, cache / cache_name(remote.url, remote.name)

    def get(n_bytes: int | None) -> tuple[Path, bool]:
        for address in _mirrors(remote, root):
            if isinstance(address, Path):
                return address, True
            with suppress(NotThereError):
                return fetch(address, cached, enough=n_bytes, sha256=sha256)
        return fetch(remote.url, cached, enough=n_bytes, sha256=sha256)

    return SourceFile(remote.name, sha256, get, remote.url, cached)


def _mirrors(remote: Remote, root: Path) -> list[Path] | list[str]:
    """Where the mirror may have a file, under its name in data/raw or that in its URL."""
    mirror = os.environ.get(MIRROR, "")
    names = list(dict.fromkeys((remote.name, remote.url.rsplit("/", 1)[-1])))
    folder = root / os.path.expanduser(mirror)  # noqa: PTH111 (it leaves an unknown ~user as it is)
    if mirror.startswith(("http://", "https://")):
        return [f"{mirror.rstrip('/')}/{name}" for name in names]
    if not folder.is_dir():
        raise UserError(f"{MIRROR}={mirror} is neither a folder nor an http(s) address: fix or unset it")
    return [folder / name for name in names if mirror and (folder / name).is_file()]


def bucket_files(params: DownloadParams, cache: Path, note: Note) -> Iterator[SourceFile]:
    """The files at an address (of a file, folder or glob), sorted, with names relative to their common folder."""
    with _refusals(params.source, cache):
        store, path = fsspec.core.url_to_fs(params.source)
        find = store.glob if fsspec.core.has_magic(path) else store.find
        kinds = {name: entry["type"] for name, entry in sorted(find(path, detail=True).items())}
        found = [name for name, kind in kinds.items() if kind != "directory"]
        read = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        for name in kinds.keys() - {*found, *read}:
            note(LEFT_OUT, "folders", PurePosixPath(name).name)
        if not found:
            raise FileNotFoundError
    base = os.path.commonpath([str(PurePosixPath(name).parent) for name in found])
    for name in found:
        inner = PurePosixPath(name).relative_to(base)
        if any(part.startswith(".") for part in inner.parts):
            note(LEFT_OUT, "hidden", str(inner))
        else:
            get = functools.partial(_copy_from_bucket, store, params.source, name, cache)
            yield SourceFile(str(inner), params.sha256, get)


def _copy_from_bucket(store: Any, source: str, name: str, cache: Path, n_bytes: int | None) -> tuple[Path, bool]:
    """Copy a file, or its first `n_bytes`, to `cache`.  -> the path of the copy, and whether it is whole

    An earlier whole copy is used as long as the file has the same size and checksum in the bucket.
    """
    with _refusals(source, cache):
        last = PurePosixPath(name).name
        copy = cache / cache_name(f"{source} {name} {store.ukey(name)}", last, n_digit=16)
        if copy.exists():
            return copy, True
        partial = copy.with_name(copy.name + ".partial")
        most = sys.maxsize if n_bytes is None else n_bytes
        cache.mkdir(parents=True, exist_ok=True)
        bar = progress(last, total=store.size(name), unit="B")
        with bar, store.open(name, "rb") as there, open(partial, "wb") as here:
            while chunk := there.read(min(CHUNK_BYTES, most - here.tell())):
                with naming(partial):
                    here.write(chunk)
                    here.flush()
                bar.update(len(chunk))
            is_whole = not there.read(1)
            os.fsync(here.fileno())  # so that a power cut cannot leave an empty file under its name
        if not is_whole:
            return partial, False
        os.replace(partial, copy)
    return copy, True


@contextmanager
def _refusals(source: str, cache: Path) -> Iterator[None]:
    """Turn a store's errors into UserErrors of one line; errors of our own disk, in `cache`, pass through."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"download.source={source} matches no files") from None
    except Exception as error:  # the packages behind fsspec raise classes of their own
        if str(cache) in str(getattr(error, "filename", "")):
            raise
        raise UserError(
            f"download.source={source} cannot be read ({error}): check the address, its package and your permissions"
        ) from None
