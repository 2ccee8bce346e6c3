"""Download files from the web. A file gets its name once it is whole; a download continues where it broke off."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import requests
import urllib3.exceptions

from tinygpt.corpus.answer import Answer, BrokenOffError, Version, leave_body
from tinygpt.corpus.archive import UnpackError, iter_members
from tinygpt.errors import UserError
from tinygpt.files import human_bytes, parse_json, sha256_file, write_json
from tinygpt.params import from_mapping
from tinygpt.progress import progress

ATTEMPTS = 5  # failures in a row without a byte of progress before giving up
BACKOFF_S = 1.0  # seconds before the second attempt; each further wait is twice as long
TIMEOUT_S = (10.0, 20.0)  # to connect, and between two pieces of the body
SLOW_S = 60.0  # in which a chunk must come: a server that sends a byte a second never times out
MOST_REDIRECTS = 10
MOST_UNTOLD = 10_000_000_000  # bytes of a file whose length the server does not state: it may never end
CHUNK_BYTES = 1 << 16  # the most that is lost when a transfer breaks off
NAME_BYTES = 200  # of a name in the cache: file systems allow 255, and more is added to it
MOST_REASON = 300  # characters of a library's error, which may quote the server
GZIP = b"\x1f\x8b"  # how a .gz begins

TRANSIENT = (
    BrokenOffError,
    requests.ConnectionError,
    requests.Timeout,
    urllib3.exceptions.ProtocolError,
    urllib3.exceptions.TimeoutError,
    urllib3.exceptions.SSLError,
)


def fetch(
    url: str,
    path: Path,
    *,
    enough: int | None = None,
    sha256: str | None = None,
    note: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Path, bool]:
    """Download `url`, or `enough` bytes of it, unless it is at `path` already.  -> its path, and whether it is whole

    A partial download is kept next to `path`. The next call continues it, unless the file on the server has changed.
    `note` is printed with the file's size. Raises UserError if the network fails, the server refuses, or the hash of
    the whole file is not `sha256`.
    """
    if path.exists() and sha256 in (None, sha256_file(path)):
        return path, True
    path.unlink(missing_ok=True)
    transfer = _Transfer(url, path, enough, note)
    if not transfer.persist(sleep):
        return transfer.partial, False
    found = sha256_file(transfer.partial) if sha256 else None
    if found != sha256:
        transfer.discard()
    check_sha256(found, sha256, url)
    transfer.finish()
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


@dataclass
class _Transfer:
    """Copies the file at `url` to `path`.partial, all of it or `enough` bytes."""

    url: str
    path: Path
    enough: int | None = None
    note: str = ""
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def size(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    @property
    def _version_path(self) -> Path:
        return self.partial.with_name(self.partial.name + ".json")

    def finish(self) -> None:
        """Give the whole file its name."""
        with open(self.partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        self.discard()

    def discard(self) -> None:
        """Remove the partial download."""
        self.partial.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)

    def persist(self, sleep: Callable[[float], None]) -> bool:
        """Try until there is enough, or ATTEMPTS in a row bring nothing.  -> whether the file is whole"""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        failures = furthest = 0
        with requests.Session() as session:
            session.max_redirects = MOST_REDIRECTS
            session.hooks["response"] = [leave_body]
            while True:
                try:
                    return self._watch(session)
                except TRANSIENT as error:
                    failures = 1 if self.size > furthest else failures + 1
                    furthest = max(self.size, furthest)
                    if failures == ATTEMPTS:
                        action = "check the network, or see TINYGPT_MIRROR in docs/data.md, and run again"
                        raise self._error(_reason(error), action) from None
                    sleep(BACKOFF_S * 2 ** (failures - 1))
                except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
                    raise UserError(f"cannot download {self.url} ({_reason(error)})") from None  # an odd redirect

    def _watch(self, session: requests.Session) -> bool:
        """Make one request in a thread; abandon it when nothing arrives for SLOW_S, not even a response."""
        outcome: Future[bool] = Future()

        def work() -> None:
            try:
                outcome.set_result(self._request(session))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        size = -1
        while not wait([outcome], timeout=SLOW_S).done:
            if size == (size := self.size):
                self.given_up.set()
                raise self._error(
                    f"the server takes more than {SLOW_S:g} s for {human_bytes(CHUNK_BYTES)}", "run again later"
                )
        return outcome.result()

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
            answer = Answer(response, self.url, offset)
            if self.given_up.is_set():
                return False
            answer.check(self.path.name)
            if answer.is_whole:
                known = Version(self.url, answer.validator, answer.length)
                self._begin(known, answer)
            elif not answer.continues(known):
                self.discard()  # the file on the server is no longer the one we have
                raise BrokenOffError("the server sent a part that was not requested")
            enough = None if answer.is_packed else self.enough
            self._receive(response, known.total, enough)
            return self._is_whole(answer, known.total, enough)

    def _known(self) -> Version:
        """The version of the partial file; empty if it is from another address, or its record cannot be read."""
        try:
            version = from_mapping(Version, parse_json(self._version_path.read_bytes()))
        except (FileNotFoundError, ValueError, UserError):
            return Version()
        return version if version.url == self.url else Version()

    def _begin(self, version: Version, answer: Answer) -> None:
        total = version.total or 0
        needed, free = min(total, self.enough or total), shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise UserError(
                f"{self.url} needs {human_bytes(needed)} in {self.path.parent}, but only {human_bytes(free)} "
                "are free: make room"
            )
        self.discard()  # before the new version is recorded
        self.partial.touch()
        if not answer.is_packed:  # else it cannot be continued
            write_json(self._version_path, asdict(version))
        if self.note and total:
            print(f"{self.note}: {human_bytes(total)}", file=sys.stderr)

    def _receive(self, response: requests.Response, total: int | None, enough: int | None) -> None:
        size = self.size
        with open(self.partial, "ab") as file, progress(self.path.name, total=total, unit="B", start=size) as bar:
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                if self.given_up.is_set():
                    return
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    error.filename = str(self.partial)  # write(), which reports a full disk, does not know the name
                    raise
                bar.update(len(chunk))
                size += len(chunk)
                if size > (total or MOST_UNTOLD) or size >= (enough or size + 1):
                    return

    def _is_whole(self, answer: Answer, total: int | None, enough: int | None) -> bool:
        if self.size > (total or MOST_UNTOLD):
            self.discard()
            raise answer.refuse(f"the server sent more than {human_bytes(total or MOST_UNTOLD)}")
        if enough and self.size >= enough and self.size != total:
            return False
        if total is not None and self.size != total:
            raise BrokenOffError(f"the transfer ended after {self.size} of {total} bytes")
        if answer.is_packed:
            self._unpack()
        if not self.size:
            self.discard()
            raise answer.refuse("the server sent an empty file")
        return True

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

    def _error(self, reason: str, advice: str) -> UserError:
        goes_on = f"; the download will continue after {human_bytes(self.size)}" if self.size else ""
        return UserError(f"cannot download {self.url} ({reason}): {advice}{goes_on}")


def _reason(error: Exception) -> str:
    """The innermost cause in words: `Connection refused` rather than four wrapped objects."""
    inner: object = error
    while isinstance(inner, Exception):
        error = inner
        inner = getattr(error, "reason", None) or next((arg for arg in error.args if isinstance(arg, Exception)), None)
    text = re.sub(r"^\w+\(.*?\): ", "", str(error))  # without the name of an object before it
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MOST_REASON]
