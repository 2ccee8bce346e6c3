"""The download stage's work: from `download.source` to text files and a manifest in data/raw."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import itertools
import platform
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tinygpt.corpus.archive import READERS, TARS, UnpackError, iter_members
from tinygpt.corpus.fetch import check_sha256
from tinygpt.corpus.folders import TEXTS, Manifest, RawDownload, RawFile, text_line, write_manifest
from tinygpt.corpus.jsonl import MOST_LINE, bad_line, line_text, lines
from tinygpt.corpus.local import local_files
from tinygpt.corpus.notes import LEFT_OUT, READ, Notes, Tell
from tinygpt.corpus.remote import SourceFile, bucket_files, local_file, web_file
from tinygpt.corpus.sniff import encoding_of, json_kind, likely_encoding
from tinygpt.corpus.sources import EMBEDDED, DownloadParams, Source, find_source, iter_python_docs
from tinygpt.errors import UserError, printable
from tinygpt.files import atomic_folder, sha256_file

MOST_NAME, MOST_PATH = 255, 1000  # bytes between two slashes of a path, as file systems take them; and of it all


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """What the stage says about its work."""

    manifest: Manifest
    notes: Notes


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
        texts = RawFolder(folder, params.max_bytes, params.encoding)
        files = [] if source is EMBEDDED else _source_files(params, source, root, raw, cache, texts.notes.add)
        if source is EMBEDDED:
            _add_embedded(params, texts)
        downloads = [_add_file(file, params, source, texts, beginnings) for file in files]
        if not any(file.bytes for file in texts.files):
            for file in files:
                file.forget()
            found = "holds no text" if files or texts.notes.names else "names no files"
            why = f" ({texts.notes})" if texts.notes.names else ""
            few = f" or raise download.max_bytes={params.max_bytes}" if params.max_bytes else ""
            raise UserError(f"download.source={params.source} {found}{why}: name another file or folder{few}")
        manifest = Manifest(
            source=params.source,
            licence=source.licence,
            separator=source.separator,
            document_start=source.document_start,
            python=platform.python_version() if source is EMBEDDED else None,
            downloads=tuple(download for download in downloads if download),
            files=tuple(texts.files),
        )
        write_manifest(folder, manifest)
    return Downloaded(manifest, texts.notes)


def _add_embedded(params: DownloadParams, texts: RawFolder) -> None:
    content = "".join(map(text_line, iter_python_docs())).encode()
    check_sha256(hashlib.sha256(content).hexdigest(), params.sha256, "python-docs.jsonl")
    texts.add("python-docs.jsonl", iter([content]))


def _add_file(
    file: SourceFile, params: DownloadParams, source: Source, texts: RawFolder, beginnings: dict[str, int]
) -> RawDownload | None:
    """Add the texts of a file, from its beginning where that holds enough.  -> its address, and its hash if it is read

    The hash is left out where the file is longer than its beginning, whether or not more of it is there by chance.
    """
    splits = {source.splits[file.name]} if file.name in source.splits else set(source.splits.values())
    first = None if source.extract else file.first_bytes(params.max_bytes)
    if texts.is_full(splits):
        return RawDownload(url=file.url, sha256=None) if file.url else None
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
    return RawDownload(url=file.url, sha256=sha256_file(path) if is_read else None) if file.url else None


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
    params: DownloadParams, source: Source, root: Path, raw: Path, cache: Path, tell: Tell
) -> list[SourceFile]:
    """The files of a source, of which those on the web and in buckets are still to be copied."""
    if source.remotes:
        files = [web_file(remote, params, root, cache) for remote in source.remotes]
    elif "://" in params.source:
        files = []
        for file in bucket_files(params, cache):
            if any(part.startswith(".") for part in PurePosixPath(file.name).parts):
                tell(LEFT_OUT, "hidden", file.name)
            else:
                files.append(file)
    else:
        found = local_files(params.source, root, raw, tell)
        files = [local_file(name, path, params) for name, path in found]
    if params.sha256 and len(files) > 1:
        raise UserError(f"download.sha256 must be null: {params.source} holds {len(files)} files, not one")
    return files


class RawFolder:
    """Copies texts into a raw folder, at most `max_bytes` of each official split, and remembers them.

    `notes` say which files were left out, and which are not what their names promise.
    """

    def __init__(self, folder: Path, max_bytes: int | None, encoding: str | None = None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.encoding = encoding  # of files that are not UTF-8
        self.files: list[RawFile] = []
        self.notes = Notes()
        self._taken: dict[str | None, int] = {}  # split -> UTF-8 bytes of text so far

    def is_full(self, splits: Collection[str]) -> bool:
        """Whether these splits, or the texts without one, have `max_bytes`, so that nothing further is read."""
        taken = [self._taken.get(split, 0) for split in splits or (None,)]
        return self.max_bytes is not None and min(taken) >= self.max_bytes

    def add(self, name: str, chunks: Iterator[bytes], *, url: str | None = None, split: str | None = None) -> None:
        """Copy one file as UTF-8, cut at the border of a document (.jsonl) or line when `max_bytes` is reached."""
        limit = None if self.max_bytes is None else self.max_bytes - self._taken.get(split, 0)
        head = next(chunks, b"")
        if limit == 0:
            return
        if not name.isprintable():
            self.notes.add(READ, "under this name", name)
        name = printable(name)
        encoding = encoding_of(head, self.encoding)
        if encoding is None or not head:
            self._leave_unread(name, head)
            return
        chunks = itertools.chain([head], chunks)
        if encoding != "utf-8":
            self.notes.add(READ, f"as {encoding}", name)
            chunks = _recoded(chunks, encoding, name)
            chunks = itertools.chain([head := next(chunks, b"")], chunks)
        name = self._name_by_content(name, head)
        copy = _copy_jsonl if name.lower().endswith(".jsonl") else _copy_text
        with self._create(name) as file:
            taken = copy(file, chunks, limit, name)
        self._taken[split] = self._taken.get(split, 0) + taken
        path = Path(file.name)
        file_bytes = path.stat().st_size
        self.files.append(RawFile(name=name, url=url, bytes=file_bytes, sha256=sha256_file(path), split=split))

    def _leave_unread(self, name: str, head: bytes) -> None:
        if not head:
            self.notes.add(LEFT_OUT, "empty", name)
        elif likely := likely_encoding(head):
            advice = "" if self.encoding else f": set download.encoding={likely}"
            self.notes.add(LEFT_OUT, "not UTF-8", f"{name} looks like {likely}{advice}")
        else:
            self.notes.add(LEFT_OUT, "packed twice" if name.lower().endswith(tuple(READERS)) else "binary", name)

    def _name_by_content(self, name: str, head: bytes) -> str:
        """What the file is called here: `clean` reads .jsonl as JSON lines."""
        kind = None if name.lower().endswith(".jsonl") else json_kind(head)
        if kind:
            self.notes.add(READ, "as JSON lines" if kind == "lines" else "as plain text, though JSON", name)
        return f"{name}.jsonl" if kind == "lines" else name

    def _create(self, name: str) -> IO[bytes]:
        path = self.folder / TEXTS / PurePosixPath(name)
        if max(len(part.encode()) for part in path.parts) > MOST_NAME or len(name.encode()) > MOST_PATH:
            raise UserError(f"{name[:MOST_NAME]}… is too long a name for a file: rename it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb")
        except (FileExistsError, NotADirectoryError):  # an archive is a folder here
            raise UserError(
                f"download.source holds two files of the name {name}, or one and an archive: rename one"
            ) from None


def _recoded(chunks: Iterable[bytes], encoding: str, name: str) -> Iterator[bytes]:
    """The same text in UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise UserError(f"download.encoding={encoding} does not read {name} ({error}): set another") from None


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
    size = 0
    for number, line in enumerate(lines(chunks, b"\n", MOST_LINE), 1):
        if len(line) > MOST_LINE:
            raise bad_line(name, number, line)
        if limit is not None and line.strip():
            if (text := line_text(line)) is None:
                raise bad_line(name, number, line)
            size += len(text.encode("utf-8", "replace"))
            if size > limit:
                return limit
        file.write(line)
    return size
