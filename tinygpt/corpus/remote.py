"""The files of a source: here, on the web or its mirror, or at an address that fsspec knows, such as s3:// and gs://.

https://filesystem-spec.readthedocs.io has the list.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec

from tinygpt.corpus.answer import NotThereError
from tinygpt.corpus.archive import READ_WHOLE, READERS
from tinygpt.corpus.fetch import CHUNK_BYTES, cache_name, fetch, forget
from tinygpt.corpus.sources import DownloadParams, Remote
from tinygpt.errors import UserError
from tinygpt.progress import progress

MIRROR = "TINYGPT_MIRROR"  # environment: a folder or an http(s) address that is looked at first
LEAST_BYTES = 131_072  # of a beginning: enough to tell a text from a picture


@dataclass(frozen=True)
class SourceFile:
    """A file, `name` as data/raw calls it."""

    name: str
    sha256: str | None  # what it must hash to
    get: Callable[[int | None], tuple[Path, bool]]  # it on this disk, or so many bytes of it at least; is it whole?
    url: str | None = None
    cached: Path | None = None  # what `get` downloads

    def forget(self) -> None:
        """Remove what was downloaded and turned out bad, or it would be taken for good; not what has the right hash."""
        if self.cached and not self.sha256:
            forget(self.cached)

    def first_bytes(self, max_bytes: int | None) -> int | None:
        """How much of the file to look at first; None = all, where no limit is set or only the whole can be read."""
        name = self.name.lower()
        if max_bytes is None or self.sha256 or name.endswith(READ_WHOLE):
            return None
        return max(LEAST_BYTES, max_bytes // 4 if name.endswith(tuple(READERS)) else max_bytes + 1)


def local_file(name: str, path: Path, params: DownloadParams) -> SourceFile:
    """A file that is here."""
    return SourceFile(name, params.sha256, lambda _: (path, True))


def web_file(remote: Remote, params: DownloadParams, root: Path, cache: Path) -> SourceFile:
    """A file that the mirror has, or the web."""
    sha256, cached = params.sha256 or remote.sha256, cache / cache_name(remote.url, remote.name)
    note = f"{remote.name} is needed whole, download.max_bytes or not" if params.max_bytes else ""

    def get(n_bytes: int | None) -> tuple[Path, bool]:
        *mirrors, url = addresses = _addresses(remote, root)
        for address in addresses:
            try:
                if isinstance(address, Path):
                    return address, True
                return fetch(address, cached, enough=n_bytes, sha256=sha256, note="" if n_bytes else note)
            except NotThereError:
                if address == url:
                    raise
        raise AssertionError(mirrors)

    return SourceFile(remote.name, sha256, get, remote.url, cached)


def _addresses(remote: Remote, root: Path) -> list[Path | str]:
    """Where a file may be, in order: the mirror may call it by either name."""
    mirror = os.environ.get(MIRROR, "")
    names = list(dict.fromkeys((remote.name, remote.url.rsplit("/", 1)[-1])))
    folder = root / Path(mirror).expanduser()
    if "://" in mirror:
        return [*(f"{mirror.rstrip('/')}/{name}" for name in names), remote.url]
    if not folder.is_dir():
        raise UserError(f"{MIRROR}={mirror} is neither a folder nor an http(s) address: mend or unset it")
    here = [folder / name for name in names if mirror and (folder / name).is_file()]
    return [*here, remote.url]


def bucket_files(params: DownloadParams, cache: Path) -> list[SourceFile]:
    """The files of an address, a folder's or a glob's, sorted by name."""
    bucket = _Bucket(params.source)
    gets = (functools.partial(bucket.copy, name, cache) for name in bucket.found)
    return [SourceFile(name, params.sha256, get) for name, get in zip(bucket.names, gets, strict=True)]


class _Bucket:
    """What an address names: the files `found`, sorted, and their `names` relative to it.

    Raises UserError where it names nothing, is refused, or needs a package that is not installed.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        with self._refusals(None):
            self.files, path = fsspec.core.url_to_fs(source)
            self.found = sorted(self.files.glob(path) if fsspec.core.has_magic(path) else self.files.find(path))
        if not self.found:
            raise UserError(f"download.source={source} names no files")
        base = os.path.commonpath([str(PurePosixPath(name).parent) for name in self.found])
        self.names = [str(PurePosixPath(name).relative_to(base)) for name in self.found]

    def copy(self, name: str, cache: Path, n_bytes: int | None) -> tuple[Path, bool]:
        """A file in `cache`, or its first `n_bytes`.  -> its path, and whether it is whole

        It is not copied again where that was done before and it has the same size and checksum there.
        """
        with self._refusals(cache):
            copy = cache / cache_name(
                f"{self.source} {name} {self.files.ukey(name)}", PurePosixPath(name).name, n_digit=16
            )
            total = self.files.size(name)
            if n_bytes is not None and (total is None or n_bytes < total) and not copy.exists():
                beginning = copy.with_name(copy.name + ".beginning")
                self._copy(name, beginning, n_bytes)
                return beginning, False
            if not copy.exists():
                partial = copy.with_name(copy.name + ".partial")
                self._copy(name, partial, total)
                os.replace(partial, copy)
        return copy, True

    def _copy(self, name: str, copy: Path, n_bytes: int | None) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.files.open(name, "rb") as source,
            open(copy, "wb") as target,
            progress(PurePosixPath(name).name, total=n_bytes, unit="B") as bar,
        ):
            while chunk := source.read(CHUNK_BYTES if n_bytes is None else min(CHUNK_BYTES, n_bytes - target.tell())):
                target.write(chunk)
                bar.update(len(chunk))

    @contextmanager
    def _refusals(self, cache: Path | None) -> Iterator[None]:
        """Make one line of what a store says; errors of our own disk, in `cache`, pass."""
        try:
            yield
        except (ImportError, ValueError) as error:  # no such protocol, or a package that is missing for it
            raise UserError(f"download.source={self.source}: {error}") from None
        except FileNotFoundError:
            raise UserError(f"download.source={self.source} names no files") from None
        except Exception as error:  # the packages behind fsspec have classes of their own
            if cache and str(cache) in str(getattr(error, "filename", "")):
                raise
            raise UserError(
                f"download.source={self.source} cannot be read ({error}): check the address and your rights"
            ) from None
