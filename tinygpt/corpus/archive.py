"""What is in a file that comes from outside: itself, or the files of an archive, or the texts of a Parquet file.

Regular files only, sane names, no more than a sane size, whole.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError

CHUNK_BYTES = 1 << 17  # not more: one that is cut off cannot be read, and a beginning is to do
ZST_BYTES = 1 << 12  # compressed bytes read at a time: even the densest become no more than 128 MB
# An archive may unpack to MOST_RATIO times its size, text compresses to a tenth or so; small ones to SMALL_BYTES.
MOST_RATIO = 200
SMALL_BYTES = 100_000_000
PARQUET_ROWS = 1000  # read at a time, so that memory does not grow with the file

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
READ_WHOLE = (".zip", ".parquet")  # what is in them stands at their end, so that a beginning says nothing

Member = tuple[str, Iterator[bytes]]  # name as a relative path with slashes, and the content in pieces


class UnpackError(UserError):
    """A packed file is damaged, cut off, or unpacks to an absurd size."""


def iter_members(path: Path, name: str | None = None) -> Iterator[Member]:
    """The files of an archive, named `<archive>/<file>`; any other file itself.  Use each before the next.

    `name` is what to call `path` itself. Raises UserError for a damaged archive, one that would write outside its
    folder, one that holds links or devices, and one that unpacks to an absurd size.
    """
    name = name or path.name
    endings = [ending for ending in READERS if name.lower().endswith(ending) and name.lower() != ending]
    ending = max(endings, key=len, default="")  # ".tar.gz" rather than ".gz"
    with _damage(name):
        yield from READERS.get(ending, _read_plain)(_File(path, name, name[: len(name) - len(ending)]))


class _File:
    """A file, `stem` its name without the ending, and how many bytes more it may unpack to."""

    def __init__(self, path: Path, name: str, stem: str) -> None:
        self.path, self.name, self.stem = path, name, stem
        self.left = max(SMALL_BYTES, MOST_RATIO * path.stat().st_size)

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise UnpackError(
                f"{self.name} unpacks to more than {MOST_RATIO} times its size: unpack it by hand if you trust it"
            )

    def chunks(self, file: IO[bytes], declared: int | None = None) -> Iterator[bytes]:
        """The content of one member, which must be `declared` bytes long."""
        size = 0
        with _damage(self.name):
            while chunk := file.read(CHUNK_BYTES):
                size += len(chunk)
                self.spend(len(chunk))
                yield chunk
            if declared is not None and size != declared:
                raise EOFError(f"{size} of {declared} bytes")

    def member(self, name: str, file: IO[bytes], declared: int) -> Member:
        """A member of an archive.  Raises UserError where its name would lead out of the archive's folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or any(c in name for c in "\\:\0"):
            raise UserError(f"{self.name} holds a file of the unsafe name {name!r}: it is not unpacked")
        return str(PurePosixPath(self.stem) / path), self.chunks(file, declared)

    def refuse(self, name: str) -> UserError:
        """The error for a link, a device or the like."""
        return UserError(f"{self.name} holds {name!r}, which is not a regular file: unpack it by hand")


def _read_plain(source: _File) -> Iterator[Member]:
    with open(source.path, "rb") as file:
        yield source.name, iter(lambda: file.read(CHUNK_BYTES), b"")


def _read_compressed(source: _File, *, opener: Callable[..., Any]) -> Iterator[Member]:
    with opener(source.path, "rb") as file:
        yield source.stem, source.chunks(file)


def _read_zip(source: _File) -> Iterator[Member]:
    with zipfile.ZipFile(source.path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: made where files have no kind
                raise source.refuse(member.filename)
            with archive.open(member) as file:
                yield source.member(member.filename, file, member.file_size)


def _read_tar(source: _File) -> Iterator[Member]:
    with tarfile.open(source.path, "r:*") as archive:
        for member in archive:
            if member.isdir():
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise source.refuse(member.name)
            yield source.member(member.name, file, member.size)


def _read_zst(source: _File) -> Iterator[Member]:
    yield source.stem, _zst_chunks(source)


def _zst_chunks(source: _File) -> Iterator[bytes]:
    try:
        from zstandard import ZstdDecompressor, ZstdError
    except ImportError:
        raise UserError(f"{source.name} needs zstandard: pip install zstandard") from None
    frame, is_whole = ZstdDecompressor().decompressobj(), True
    with open(source.path, "rb") as file, _damage(source.name):
        while compressed := file.read(ZST_BYTES):
            while compressed:
                try:
                    chunk = frame.decompress(compressed)
                except ZstdError as error:
                    raise EOFError(str(error)) from None
                compressed, is_whole = frame.unused_data, frame.eof
                if frame.eof:  # others may follow it
                    frame = ZstdDecompressor().decompressobj()
                source.spend(len(chunk))
                if chunk:
                    yield chunk
        if not is_whole:
            raise EOFError("it ends inside a frame")


def _read_parquet(source: _File) -> Iterator[Member]:
    yield source.stem + ".jsonl", _parquet_lines(source.path, source.name)


def _parquet_lines(path: Path, name: str) -> Iterator[bytes]:
    """The column `text` as lines of {"text": …}, some rows at a time; rows without a text are left out.

    Raises UserError where pyarrow is missing, the file is damaged, or has no such column of texts.
    Format: https://parquet.apache.org/docs/file-format/
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    try:
        with _damage(name), ParquetFile(path) as file:
            kind = {field.name: str(field.type) for field in file.schema_arrow}.get("text")
            if kind not in ("string", "large_string"):
                found = "none" if kind is None else f"one of {kind}"
                raise UserError(f"{name} needs a column `text` of strings and has {found}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                yield "".join(text_line(text) for text in batch.column("text").to_pylist() if text is not None).encode()
    except ArrowException as error:
        raise _damaged(name, error) from None


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Report any kind of broken archive in one way."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise _damaged(name, error) from None
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a password, an unknown method
        raise UserError(f"{name} cannot be unpacked ({error}): unpack it by hand") from None
    except OSError as error:
        if error.errno is None:  # bz2: "Invalid data stream"
            raise _damaged(name, error) from None
        raise


def _damaged(name: str, error: Exception) -> UnpackError:
    return UnpackError(f"{name} is damaged or cut off ({' '.join(str(error).split())}): get it again")


# By the ending of a file's name; of another file it is the content itself that is read.
READERS: dict[str, Callable[[_File], Iterator[Member]]] = {
    ".gz": partial(_read_compressed, opener=gzip.open),
    ".bz2": partial(_read_compressed, opener=bz2.open),
    ".xz": partial(_read_compressed, opener=lzma.open),
    ".zst": _read_zst,
    ".zip": _read_zip,
    ".parquet": _read_parquet,
    **dict.fromkeys(TARS, _read_tar),
}
