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
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError

CHUNK_BYTES = 1 << 20
ZST_BYTES = 1 << 12  # compressed bytes read at a time: even the densest become no more than 128 MB
# An archive may unpack to MOST_RATIO times its size, text compresses to a tenth or so; small ones to SMALL_BYTES.
MOST_RATIO = 200
SMALL_BYTES = 100_000_000

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARCHIVES = (*TAR, ".zip")
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}  # one compressed file, no archive

Member = tuple[str, Iterator[bytes]]  # name as a relative path with slashes, and the content in pieces


def iter_members(path: Path, name: str | None = None) -> Iterator[Member]:
    """The files of an archive, named `<archive>/<file>`; any other file itself.  Use each before the next.

    `name` is what to call `path` itself. Raises UserError for a damaged archive, one that would write outside its
    folder, one that holds links or devices, and one that unpacks to an absurd size.
    """
    name = name or path.name
    lower = name.lower()
    budget = _Budget(path, name)
    with _damage(name):
        if lower.endswith(".zip"):
            yield from _zip_members(path, name, budget)
        elif lower.endswith(TAR):
            yield from _tar_members(path, name, budget)
        elif lower.endswith(".zst"):
            yield name[: -len(".zst")], _zst_chunks(path, name, budget)
        elif lower.endswith(".parquet"):
            yield name.removesuffix(PurePosixPath(name).suffix) + ".jsonl", iter_parquet_lines(path, name)
        elif (ending := PurePosixPath(lower).suffix) in OPENERS:
            with OPENERS[ending](path, "rb") as file:
                yield name[: -len(ending)], budget.chunks(file)
        else:
            with open(path, "rb") as file:
                yield name, iter(lambda: file.read(CHUNK_BYTES), b"")


class _Budget:
    """Counts what an archive unpacks to."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.left = max(SMALL_BYTES, MOST_RATIO * path.stat().st_size)

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise UserError(
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


def _zst_chunks(path: Path, name: str, budget: _Budget) -> Iterator[bytes]:
    try:
        from zstandard import ZstdDecompressor, ZstdError
    except ImportError:
        raise UserError(f"{name} needs zstandard: pip install zstandard") from None
    frame, is_whole = ZstdDecompressor().decompressobj(), True
    with open(path, "rb") as file, _damage(name):
        while compressed := file.read(ZST_BYTES):
            while compressed:
                try:
                    chunk = frame.decompress(compressed)
                except ZstdError as error:
                    raise EOFError(str(error)) from None
                compressed, is_whole = frame.unused_data, frame.eof
                if frame.eof:  # others may follow it
                    frame = ZstdDecompressor().decompressobj()
                budget.spend(len(chunk))
                if chunk:
                    yield chunk
        if not is_whole:
            raise EOFError("it ends inside a frame")


def _zip_members(path: Path, name: str, budget: _Budget) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):  # 0: made where files have no such kind
                raise UserError(f"{name} holds {member.filename!r}, which is no regular file: unpack it by hand")
            with archive.open(member) as file:
                yield _safe_name(name, member.filename), budget.chunks(file, member.file_size)


def _tar_members(path: Path, name: str, budget: _Budget) -> Iterator[Member]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if member.isdir():
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise UserError(f"{name} holds {member.name!r}, which is no regular file: unpack it by hand")
            yield _safe_name(name, member.name), budget.chunks(file, member.size)


def _safe_name(archive: str, member: str) -> str:
    """`<archive without its ending>/<member>`, refused where it would lead out of that folder."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or not path.parts or any(c in member for c in "\\:\0"):
        raise UserError(f"{archive} holds a file of the unsafe name {member!r}: it is not unpacked")
    ending = next(
        ending for ending in sorted((*TAR, ".zip"), key=len, reverse=True) if archive.lower().endswith(ending)
    )
    return str(PurePosixPath(archive[: -len(ending)]) / path)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Tell of any kind of broken archive in one way."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{name} is damaged or cut off ({error}): delete it, get it again") from None
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a password, an unknown method
        raise UserError(f"{name} cannot be unpacked ({error}): unpack it by hand") from None
    except OSError as error:
        if error.errno is None:  # bz2: "Invalid data stream"
            raise UserError(f"{name} is damaged ({error}): delete it, get it again") from None
        raise


ROWS = 1000  # read at a time, so that memory does not grow with the file


def iter_parquet_lines(path: Path, name: str) -> Iterator[bytes]:
    """The column `text`, some rows at a time; rows without a text are left out.

    Raises UserError where pyarrow is missing, the file is damaged, or has no such column of texts.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            kind = {field.name: str(field.type) for field in file.schema_arrow}.get("text")
            if kind not in ("string", "large_string"):
                found = "none" if kind is None else f"one of {kind}"
                raise UserError(f"{name} needs a column `text` of strings and has {found}")
            for batch in file.iter_batches(ROWS, columns=["text"]):
                yield "".join(text_line(text) for text in batch.column("text").to_pylist() if text is not None).encode()
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{name} is damaged or cut off ({' '.join(str(error).split())}): delete it, get it again"
        ) from None
