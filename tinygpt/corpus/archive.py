"""The contents of an untrusted file: the file itself, the files in an archive, or the texts in a Parquet file.

Only regular files with safe names come out, complete and of a sane size.
"""

import bz2
import errno
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from tinygpt.corpus.folders import text_line
from tinygpt.corpus.local import LEFT_OUT, Note, Notes
from tinygpt.errors import UserError, shown
from tinygpt.files import human_bytes

CHUNK_BYTES = 1 << 17  # small: where only the beginning of a file is there, the last, incomplete chunk is lost
# A file may unpack to MOST_RATIO times its size (text compresses to about a tenth), a small one to SMALL_BYTES.
MOST_RATIO = 200
SMALL_BYTES = 100_000_000
MOST_WINDOW = 128 << 20  # bytes of memory that .xz and .zst may ask for: `xz -9` asks for 65 MB
MOST_HEADER = 1 << 20  # bytes of metadata before a tar member: its name and other attributes
MOST_SHOWN = 200  # characters of a name, or of a library's error
STRINGS = ("string", "large_string", "string_view")  # types of a Parquet column
ROWS = 4  # of Parquet, decoded at a time: with dictionary encoding, a few bytes may stand for a long text
BUFFER_BYTES = 1 << 20  # without a buffer pyarrow reads all of a row group at once

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
READ_WHOLE = (".zip", ".parquet")  # their index is at the end, so the beginning alone cannot be read

Member = tuple[str, Iterator[bytes]]  # name as a relative path with slashes, and the content in pieces


class UnpackError(UserError):
    """A packed file is damaged or cut off, so that a download of it is worth nothing."""


def iter_members(path: Path, name: str | None = None, note: Note | None = None) -> Iterator[Member]:
    """The files in an archive, named `<archive>/<file>`; any other file as it is.  Read each before the next.

    `name` is the name to use for `path`. Hidden files, links, devices and the like are left out and reported. Raises
    UserError for an archive that is damaged, has a name that leads outside it, or unpacks to an absurd size.
    """
    name, note = name or path.name, note or Notes().add
    last = PurePosixPath(name).name.lower()
    endings = [ending for ending in READERS if last.endswith(ending) and last.removesuffix(ending).strip(".")]
    ending = max(endings, key=len, default="")  # ".tar.gz" rather than ".gz"
    read = READERS.get(ending, _read_plain) if path.stat().st_size else _read_plain
    with _damage(name):
        yield from read(_File(path, name, name[: len(name) - len(ending)], note))


class _File:
    """A file; `stem` is its name without the ending, `left` the bytes that it may still unpack to."""

    def __init__(self, path: Path, name: str, stem: str, note: Note) -> None:
        self.path, self.name, self.stem, self.note = path, name, stem, note
        self.left = max(SMALL_BYTES, MOST_RATIO * path.stat().st_size)

    def spend(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces, subtracted from `left`.  Raises UserError when nothing is left."""
        for piece in pieces:
            self.left -= len(piece)
            if self.left < 0:
                raise UserError(
                    f"{self.name} unpacks to more than {MOST_RATIO} times its size: unpack it by hand if you trust it"
                )
            yield piece

    def takes(self, name: str, mode: int) -> bool:
        """Whether to read a member, judging by its name and mode.  Raises UserError for a name that leads outside."""
        path = PureWindowsPath(name)  # splits at / and at \
        if path.anchor or ".." in path.parts or not path.parts or "\0" in name:
            raise UserError(f"{self.name} holds a file with the unsafe name {shown(name[:MOST_SHOWN])}: remove it")
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            self.note(LEFT_OUT, "hidden", self.inner(name))
        elif not stat.S_ISREG(mode):
            self.note(LEFT_OUT, "links" if stat.S_ISLNK(mode) else "special files", self.inner(name))
        else:
            return True
        return False

    def inner(self, name: str) -> str:
        """The name of a member: `<archive>/<file>`."""
        return str(PurePosixPath(self.stem) / name)

    def checked(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces.  Raises UnpackError for any damage."""
        with _damage(self.name):
            yield from pieces


class Packing(NamedTuple):
    """A compression format."""

    begins: tuple[bytes, ...]  # magic bytes at the beginning of a file
    feed: int  # compressed bytes to unpack at a time: even the densest give no more than SMALL_BYTES
    open: Callable[[], Any]  # makes a decompressor of one frame; a file may have several


def _open_zst() -> Any:
    try:
        from zstandard import ZstdDecompressor
    except ImportError:
        raise UserError("a .zst file needs zstandard: pip install zstandard") from None
    return ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()


PACKINGS = (
    Packing((b"\x1f\x8b",), 1 << 10, partial(zlib.decompressobj, 31)),
    Packing((b"BZh",), 1 << 6, bz2.BZ2Decompressor),  # 64 bytes can be two blocks of 47 MB
    Packing((b"\xfd7zXZ\0",), 1 << 10, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, MOST_WINDOW)),
    Packing((b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"), 1 << 10, _open_zst),
)


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file, compressed or plain, as a stream that can only be read forwards."""

    def __init__(self, source: _File) -> None:
        with open(source.path, "rb") as file:
            begin = file.read(8)
        self.packing = next((packing for packing in PACKINGS if begin.startswith(packing.begins)), None)
        self._pieces = source.spend(self._unpack(source.path))
        self._piece = io.BytesIO()
        self._at = 0
        self.header = 0  # bytes that the current header may still have; 0 outside headers
        self.last = b""  # the bytes of the last read

    def _unpack(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            if self.packing is None:
                yield from iter(partial(file.read, CHUNK_BYTES), b"")
                return
            frame, is_new = self.packing.open(), True
            while packed := file.read(self.packing.feed):
                while packed := (packed.lstrip(b"\0") if is_new else packed):  # zeros may pad the end
                    if piece := frame.decompress(packed):
                        yield piece
                    is_new, packed = frame.eof, frame.unused_data
                    if is_new:
                        frame = self.packing.open()
            if not is_new:
                raise EOFError("it ends too early")

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, fewer at the end."""
        if self.header:
            self.header -= n
            if n < 0 or self.header <= 0:
                raise tarfile.ReadError(f"a name or header of more than {human_bytes(MOST_HEADER)}")
        found = bytearray(self._piece.read(n))
        while len(found) < n and (piece := next(self._pieces, None)) is not None:
            self._piece = io.BytesIO(piece)
            found += self._piece.read(n - len(found))
        self._at += len(found)
        self.last = bytes(found)
        return self.last

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        """Skip forwards to `position`, or to the end.  tarfile always counts from the beginning."""
        if position < self._at:
            raise tarfile.ReadError("it points backwards")
        header, self.header = self.header, 0
        while self._at < position and self.read(min(CHUNK_BYTES, position - self._at)):
            pass
        self.header = header
        return self._at


def _read_plain(source: _File) -> Iterator[Member]:
    with open(source.path, "rb") as file:
        yield source.name, source.checked(iter(partial(file.read, CHUNK_BYTES), b""))


def _read_compressed(source: _File) -> Iterator[Member]:
    file = _Unpacked(source)
    if file.packing is None:
        raise UnpackError(f"{source.name} is damaged or cut off (it is not compressed): get it again, or rename it")
    yield source.stem, source.checked(iter(partial(file.read, CHUNK_BYTES), b""))


def _read_zip(source: _File) -> Iterator[Member]:
    with zipfile.ZipFile(source.path) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16) or stat.S_IFREG  # 0: no Unix mode was stored
            if member.filename.endswith("/") or not source.takes(member.filename, kind):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile limits only these
                raise NotImplementedError(f"compression method {member.compress_type}")
            with archive.open(member) as file:
                pieces = source.spend(iter(partial(file.read, CHUNK_BYTES), b""))
                yield source.inner(member.filename), source.checked(pieces)


def _read_tar(source: _File) -> Iterator[Member]:
    file = _Unpacked(source)
    file.header = MOST_HEADER
    with tarfile.TarFile(fileobj=file, encoding="utf-8") as archive:
        while member := archive.next():
            file.header = 0
            is_plain = member.isreg() and not member.issparse()
            kind = stat.S_IFREG if is_plain else stat.S_IFLNK if member.issym() or member.islnk() else 0
            if not member.isdir() and source.takes(member.name, kind):
                content = archive.extractfile(member)
                assert content is not None
                pieces = iter(partial(content.read, CHUNK_BYTES), b"")
                yield source.inner(member.name), source.checked(pieces)
            vars(archive).update(members=[], pax_headers={})  # they would grow with the archive
            file.header = MOST_HEADER
    if not file.last or file.last.strip(b"\0"):  # tarfile takes any invalid header for the end
        raise tarfile.ReadError("no end mark")


def _read_parquet(source: _File) -> Iterator[Member]:
    yield source.stem + ".jsonl", source.checked(source.spend(_parquet_lines(source)))


def _parquet_lines(source: _File) -> Iterator[bytes]:
    """The column `text` as lines of {"text": …}, in pieces; rows without a text are left out."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{source.name} needs pyarrow: pip install 'pyarrow>=26'") from None
    with ParquetFile(source.path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        kind = {field.name: field.type for field in file.schema_arrow}.get("text")
        if str(getattr(kind, "value_type", kind)) not in STRINGS:
            found = "none" if kind is None else f"type {kind}"
            raise UserError(f"{source.name} needs a column `text` of strings, found {found}")
        piece = bytearray()
        for batch in file.iter_batches(ROWS, columns=["text"], use_threads=False):
            column = batch.column("text")
            plain = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            for text in plain.cast(pyarrow.binary()).drop_null().to_pylist():
                line = text_line(text.decode("utf-8", "surrogateescape"))  # other bytes stay, for `clean` to count
                piece += line.encode("utf-8", "surrogateescape")
            if len(piece) > CHUNK_BYTES:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Report every broken archive in the same way: on bad data, the libraries raise all kinds of exceptions."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk, not the data
            error.filename = error.filename or name
            raise
        reason = " ".join(str(error).split())[:MOST_SHOWN] or type(error).__name__
        # zipfile: encrypted, or an unknown method; the others: more memory than we allow
        if isinstance(error, NotImplementedError | RuntimeError | MemoryError) or "memory" in reason.lower():
            raise UserError(f"{name} cannot be unpacked ({reason}): unpack it by hand") from None
        raise UnpackError(f"{name} is damaged or cut off ({reason}): get it again") from None


# How to read a file, by the ending of its name; a file with any other ending is read as it is.
READERS: dict[str, Callable[[_File], Iterator[Member]]] = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), _read_compressed),
    **dict.fromkeys(TARS, _read_tar),
    ".zip": _read_zip,
    ".parquet": _read_parquet,
}
