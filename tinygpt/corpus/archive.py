"""What is in a file that comes from outside: itself, or the files of an archive, or the texts of a Parquet file.

Regular files only, sane names, no more than a sane size, whole.
"""

from __future__ import annotations

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

from tinygpt.corpus.local import LEFT_OUT, Note, Notes
from tinygpt.corpus.parquet import parquet_lines
from tinygpt.errors import UserError, shown
from tinygpt.files import human_bytes

CHUNK_BYTES = 1 << 17  # not more: a chunk that is cut off cannot be read, and a beginning must do
# A file may unpack to MOST_RATIO times its size, text compresses to a tenth or so; a small one to SMALL_BYTES.
MOST_RATIO = 200
SMALL_BYTES = 100_000_000
MOST_WINDOW = 128 << 20  # bytes of memory that .xz and .zst may ask for: `xz -9` asks for 65 MB
MOST_HEADER = 1 << 20  # bytes before a member of a tar: its name and what else is known of it
MOST_SHOWN = 200  # characters of an error

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
READ_WHOLE = (".zip", ".parquet")  # what is in them stands at their end, so that a beginning says nothing

Member = tuple[str, Iterator[bytes]]  # name as a relative path with slashes, and the content in pieces


class UnpackError(UserError):
    """A packed file is damaged, cut off, or unpacks to an absurd size."""


def iter_members(path: Path, name: str | None = None, note: Note | None = None) -> Iterator[Member]:
    """The files of an archive, named `<archive>/<file>`; any other file itself.  Use each before the next.

    `name` is what to call `path` itself. Hidden files, links, devices and the like are left out and reported. Raises
    UserError for a damaged archive, one that would write outside its folder, and one that unpacks to an absurd size.
    """
    name, note = name or path.name, note or Notes().add
    last = PurePosixPath(name).name.lower()
    endings = [ending for ending in READERS if last.endswith(ending) and last.removesuffix(ending).strip(".")]
    ending = max(endings, key=len, default="")  # ".tar.gz" rather than ".gz"
    with _damage(name):
        yield from READERS.get(ending, _read_plain)(_File(path, name, name[: len(name) - len(ending)], note))


class _File:
    """A file, `stem` its name without the ending, and how many bytes more it may unpack to."""

    def __init__(self, path: Path, name: str, stem: str, note: Note) -> None:
        self.path, self.name, self.stem, self.note = path, name, stem, note
        self.left = max(SMALL_BYTES, MOST_RATIO * path.stat().st_size)

    def spend(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces, counted."""
        for piece in pieces:
            self.left -= len(piece)
            if self.left < 0:
                raise UnpackError(
                    f"{self.name} unpacks to more than {MOST_RATIO} times its size: unpack it by hand if you trust it"
                )
            yield piece

    def takes(self, name: str, mode: int) -> bool:
        """Whether a member is taken, by its name and kind.  Raises UserError where it leads out of the archive."""
        path = PureWindowsPath(name)  # which splits at both kinds of slashes
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
        """What a member is called."""
        return str(PurePosixPath(self.stem) / name)

    def checked(self, pieces: Iterator[bytes], declared: int | None = None) -> Iterator[bytes]:
        """The same pieces, which must have `declared` bytes together.  Raises UnpackError for whatever is wrong."""
        size = 0
        with _damage(self.name):
            for piece in pieces:
                size += len(piece)
                yield piece
            if declared not in (None, size):
                raise EOFError(f"{size} of {declared} bytes")


class Packing(NamedTuple):
    """A way to compress a file."""

    begins: tuple[bytes, ...]  # how such a file does
    feed: int  # compressed bytes unpacked at a time: even the densest become no more than SMALL_BYTES
    open: Callable[[], Any]  # one frame; a file may have several


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
    """The bytes that a compressed file holds, or a plain one, which can only be read forwards."""

    def __init__(self, source: _File) -> None:
        with open(source.path, "rb") as file:
            begin = file.read(8)
        self.packing = next((packing for packing in PACKINGS if begin.startswith(packing.begins)), None)
        self._pieces = source.spend(self._unpack(source.path))
        self._piece = io.BytesIO()
        self._at = 0
        self.header = 0  # bytes that may still be read of one, or nothing while there is none
        self.last = b""  # what was read last

    def _unpack(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            if self.packing is None:
                yield from iter(partial(file.read, CHUNK_BYTES), b"")
                return
            frame, is_new = self.packing.open(), True
            while packed := file.read(self.packing.feed):
                while packed := (packed.lstrip(b"\0") if is_new else packed):  # zeros may fill up the end
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
        """How many bytes were read."""
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        """Read on up to there, or to the end.  tarfile counts from the beginning, always."""
        if position < self._at:
            raise tarfile.ReadError("it leads backwards")
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
        raise EOFError("it is not compressed")
    yield source.stem, source.checked(iter(partial(file.read, CHUNK_BYTES), b""))


def _read_zip(source: _File) -> Iterator[Member]:
    with zipfile.ZipFile(source.path) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16) or stat.S_IFREG  # 0: made where files have no kind
            if member.filename.endswith("/") or not source.takes(member.filename, kind):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile bounds no others
                raise NotImplementedError(f"compression method {member.compress_type}")
            with archive.open(member) as file:
                pieces = source.spend(iter(partial(file.read, CHUNK_BYTES), b""))
                yield source.inner(member.filename), source.checked(pieces, member.file_size)


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
                yield source.inner(member.name), source.checked(pieces, member.size)
            vars(archive).update(members=[], pax_headers={})  # which would grow with the archive, names and all
            file.header = MOST_HEADER
    if not file.last or file.last.strip(b"\0"):  # tarfile takes whatever is not a header for the end
        raise tarfile.ReadError("no end mark")


def _read_parquet(source: _File) -> Iterator[Member]:
    yield source.stem + ".jsonl", source.checked(source.spend(parquet_lines(source.path, source.name)))


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Report any kind of broken archive in one way: the libraries raise whatever comes up when they read nonsense."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, not of what it says
            error.filename = error.filename or name
            raise
        reason = str(error)[:MOST_SHOWN] or type(error).__name__
        # zipfile: a password, an unknown method; the others: more memory than we allow
        if isinstance(error, NotImplementedError | RuntimeError | MemoryError) or "memory" in reason.lower():
            raise UserError(f"{name} cannot be unpacked ({reason}): unpack it by hand") from None
        raise UnpackError(f"{name} is damaged or cut off ({reason}): get it again") from None


# By the ending of a file's name; of another file it is the content itself that is read.
READERS: dict[str, Callable[[_File], Iterator[Member]]] = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), _read_compressed),
    **dict.fromkeys(TARS, _read_tar),
    ".zip": _read_zip,
    ".parquet": _read_parquet,
}
