"""Download files from the web. A file gets its name once it is whole; a download continues where it broke off.

HTTP: https://www.rfc-editor.org/rfc/rfc9110 (ranges in chapter 14). Servers get all of it wrong at times.
"""

import hashlib
import os
import re
import shutil
from dataclasses import asdict, dataclass
from http import client
from pathlib import Path, PurePosixPath
from time import sleep
from typing import Any

import requests
import urllib3.exceptions

from tinygpt.corpus.archive import UnpackError, iter_members
from tinygpt.errors import UserError
from tinygpt.files import human_bytes, naming, parse_json, sha256_file, write_json
from tinygpt.params import from_mapping
from tinygpt.progress import progress

ATTEMPTS = 5  # failures in a row without a byte of progress before giving up
BACKOFF_S = 1.0  # seconds before the second attempt; each further wait is twice as long
TIMEOUT_S = (10.0, 20.0)  # to connect, and between two pieces of the body
MOST_UNTOLD = 10_000_000_000  # bytes of a file whose length the server does not state: it may never end
CHUNK_BYTES = 1 << 16  # the most that is lost when a transfer breaks off
NAME_BYTES = 200  # of a name in the cache: file systems allow 255, and more is added to it
MOST_REASON = 300  # characters of a library's error, which may quote the server
GZIP = b"\x1f\x8b"  # how a .gz begins

BUSY = {408, 425, 429}  # client errors worth a retry, as every 5xx is
PAGES = ("", ".html", ".htm", ".xhtml", ".php", ".asp", ".aspx", ".jsp")  # suffixes of files that may be HTML
HTML = ("text/html", "application/xhtml+xml")


class NotThereError(UserError):
    """The server did not send the file, and a retry would not help."""


class BrokenOffError(Exception):
    """The transfer failed, but a retry may succeed."""


def fetch(url: str, path: Path, *, enough: int | None = None, sha256: str | None = None) -> tuple[Path, bool]:
    """Download `url`, or `enough` bytes of it, unless it is at `path` already.  -> its path, and whether it is whole

    A partial download is kept next to `path`. The next call continues it, unless the file on the server has changed.
    Raises UserError if the network fails, the server refuses, or the hash of the whole file, which stays at `path`, is
    not `sha256`.
    """
    if path.exists() and (sha256 is None or sha256_file(path) == sha256):
        return path, True
    transfer = _Transfer(url, path, enough)
    if not transfer.persist():
        return transfer.partial, False
    with open(transfer.partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(transfer.partial, path)
    transfer.discard()
    check_sha256(sha256_file(path) if sha256 else None, sha256, url)  # it stays: perhaps the hash has a typo
    return path, True


def check_sha256(found: str | None, expected: str | None, name: str) -> None:
    """Raise UserError if another hash was expected."""
    if expected not in (None, found):
        raise UserError(f"{name} has sha256 {found}, expected {expected}: it is the wrong file, or it has changed")


def cache_name(address: str, name: str, *, n_digit: int = 8) -> str:
    """A file's name in the cache. It begins with a hash of the address, as two addresses may end in the same name."""
    mark = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:n_digit]
    return f"{mark}-{name.encode('utf-8', 'replace')[-NAME_BYTES:].decode('utf-8', 'ignore')}"


def forget(path: Path) -> None:
    """Remove a download, whole or partial."""
    path.unlink(missing_ok=True)
    _Transfer("", path).discard()


@dataclass(frozen=True)
class Version:
    """The version of a file that a partial download belongs to."""

    url: str | None = None
    validator: str | None = None  # a strong ETag, else the file's date
    total: int | None = None  # bytes


@dataclass
class _Transfer:
    """Copies the file at `url` to `path`.partial, all of it or `enough` bytes."""

    url: str
    path: Path
    enough: int | None = None

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def size(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    @property
    def _version_path(self) -> Path:
        return self.partial.with_name(self.partial.name + ".json")

    def discard(self) -> None:
        """Remove the partial download."""
        self.partial.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)

    def persist(self) -> bool:
        """Try until there is enough, or ATTEMPTS in a row bring nothing.  -> whether the file is whole"""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        failures = furthest = 0
        with requests.Session() as session:
            session.hooks["response"] = [_leave_body]
            while True:
                try:
                    return self._request(session)
                except (ValueError, requests.TooManyRedirects) as error:  # an odd redirect
                    raise self._refusal(_reason(error)) from None
                except (BrokenOffError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    failures = 1 if self.size > furthest else failures + 1
                    furthest = max(self.size, furthest)
                    if failures == ATTEMPTS:
                        goes_on = f"; the download will continue after {human_bytes(self.size)}" if self.size else ""
                        raise UserError(
                            f"cannot download {self.url} ({_reason(error)}): check the network, or see TINYGPT_MIRROR "
                            f"in docs/data.md, and run again{goes_on}"
                        ) from None
                    sleep(BACKOFF_S * 2 ** (failures - 1))

    def _request(self, session: requests.Session) -> bool:
        """Request the file, or the rest of it.  -> whether it is whole"""
        known = self._known()
        if self.size and self.size == known.total:
            return True  # the program was killed after the last byte, before renaming it
        if self.enough and known.url and self.size >= self.enough:
            return False
        offset = self.size if known.validator and known.total else 0
        headers = {"Accept-Encoding": "identity"}  # so that lengths and offsets count the file's own bytes
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": known.validator or ""}
        with session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            self._check(response, offset)
            is_packed = _encoding(response) != "identity"  # though the server was asked not to
            if response.status_code == 200:  # a new download, a changed file, or a server without ranges
                known = Version(self.url, _validator(response), _length(response))
                self._begin(known, is_packed)
            elif is_packed or not _continues(response, known, offset):
                self.discard()  # the file on the server is no longer the one we have
                raise BrokenOffError("the server sent a part that was not requested")
            enough = None if is_packed else self.enough
            self._receive(response, known.total, enough)
        if self.size > (known.total or MOST_UNTOLD):
            self.discard()
            raise self._refusal(f"the server sent more than {human_bytes(known.total or MOST_UNTOLD)}")
        if enough and self.size >= enough and self.size != known.total:
            return False
        if known.total not in (None, self.size):
            raise BrokenOffError(f"the transfer ended after {self.size} of {known.total} bytes")
        if is_packed:
            self._unpack()
        if not self.size:
            self.discard()
            raise self._refusal("the server sent an empty file")
        return True

    def _known(self) -> Version:
        """The version of the partial file; empty if it is from another address, or its record cannot be read."""
        try:
            version = from_mapping(Version, parse_json(self._version_path.read_bytes()))
        except (FileNotFoundError, ValueError, UserError):
            return Version()
        return version if version.url == self.url else Version()

    def _check(self, response: requests.Response, offset: int) -> None:
        """Raise BrokenOffError for a response worth a retry, NotThereError for one that is not the file."""
        status = response.status_code
        says = f"the server answered {status} {client.responses.get(status, '')}".strip()
        if status in BUSY or status >= 500:
            raise BrokenOffError(says)
        if offset and status == 416:
            return  # there is no such range; the body may be an error page
        if status != 200 and not (offset and status == 206):  # 206 answers only a range request
            raise self._refusal(says)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in HTML and PurePosixPath(self.path.name).suffix.lower() not in PAGES:
            raise self._refusal(
                f"the server sent a web page, perhaps a login: download {self.path.name} yourself and set "
                "download.source to that file"
            )
        if _encoding(response) not in ("identity", "gzip", "x-gzip"):
            raise self._refusal("the server compressed the file with something other than gzip")

    def _refusal(self, reason: str) -> NotThereError:
        return NotThereError(f"cannot download {self.url}: {reason}")

    def _begin(self, version: Version, is_packed: bool) -> None:
        total = version.total or 0
        needed, free = min(total, self.enough or total), shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise UserError(
                f"{self.url} needs {human_bytes(needed)} in {self.path.parent}, but only {human_bytes(free)} "
                "are free: make room"
            )
        self.discard()  # before the new version is recorded
        self.partial.touch()
        if not is_packed:  # else it cannot be continued
            write_json(self._version_path, asdict(version))

    def _receive(self, response: requests.Response, total: int | None, enough: int | None) -> None:
        size = self.size
        with open(self.partial, "ab") as file, progress(self.path.name, total=total, unit="B", start=size) as bar:
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                with naming(self.partial):
                    file.write(chunk)
                    file.flush()
                bar.update(len(chunk))
                size += len(chunk)
                if size > (total or MOST_UNTOLD) or size >= (enough or size + 1):
                    return

    def _unpack(self) -> None:
        """Undo the server's gzip, but not that of a .gz file itself, which many servers declare as theirs."""
        unpacked = self.partial.with_name(self.partial.name + ".unpacked")
        try:
            with open(unpacked, "wb") as file:
                for _, chunks in iter_members(self.partial, "the answer.gz"):
                    file.writelines(chunks)
            with open(unpacked, "rb") as file:
                is_file = not self.path.name.lower().endswith((".gz", ".tgz")) or file.read(2) == GZIP
            if is_file:
                os.replace(unpacked, self.partial)
        except UnpackError as error:
            self.discard()
            raise BrokenOffError(str(error)) from None
        finally:
            unpacked.unlink(missing_ok=True)


def _encoding(response: requests.Response) -> str:
    return response.headers.get("Content-Encoding", "").strip().lower() or "identity"


def _validator(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _length(response: requests.Response) -> int | None:
    """Bytes of the body; None if Content-Length is missing, invalid, or overridden by Transfer-Encoding."""
    length = response.headers.get("Content-Length", "")
    is_valid = re.fullmatch("[0-9]{1,30}", length) and "Transfer-Encoding" not in response.headers
    return int(length) if is_valid else None


def _continues(response: requests.Response, known: Version, offset: int) -> bool:
    """Whether the body continues that version of the file at `offset`; it may stop before the end."""
    part = re.fullmatch(rf"bytes {offset}-[0-9]+/{known.total}", response.headers.get("Content-Range", ""))
    return part is not None and _validator(response) == known.validator


def _leave_body(response: requests.Response, **_: Any) -> None:
    """Close a redirect unread: requests would read its whole body, however long."""
    if response.is_redirect:
        response.close()


def _reason(error: Exception) -> str:
    """The innermost cause in words: `Connection refused` rather than four wrapped objects."""
    inner: object = error
    while isinstance(inner, Exception):
        error = inner
        inner = getattr(error, "reason", None) or next((arg for arg in error.args if isinstance(arg, Exception)), None)
    text = re.sub(r"^\w+\(.*?\): ", "", str(error))  # without the name of an object before it
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MOST_REASON]
