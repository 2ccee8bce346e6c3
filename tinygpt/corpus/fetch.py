"""Files from an address, copied to this disk and there under their names only when they are whole.

HTTP downloads go on where they broke off. Other addresses (s3://, gs://, …) are those that fsspec knows
(https://filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import requests

from tinygpt.errors import UserError
from tinygpt.files import human_bytes, sha256_file, write_json
from tinygpt.progress import progress

ATTEMPTS = 6  # failures in a row without a byte of progress before giving up
BACKOFF_S = 1.0  # seconds before the second attempt; each further wait is twice as long
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two pieces of the body
MOST_REDIRECTS = 10
CHUNK_BYTES = 1 << 16  # what is lost at most when a transfer breaks off
BUSY = {408, 425, 429}  # client errors that pass; every 5xx is one too


class NotThereError(UserError):
    """The server answered that it will not serve this address (a 4xx status)."""


class _InterruptedError(Exception):
    """The transfer broke off in a way that may pass."""


TRANSIENT = (
    _InterruptedError,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


def fetch(url: str, path: Path, *, sha256: str | None = None, sleep: Callable[[float], None] = time.sleep) -> str:
    """Download `url` to `path` unless it is there already.  -> hex SHA-256 of the file

    A partial download stays next to `path` and is continued, unless the server's file has changed since.
    Raises UserError where the network fails, the server refuses, or the bytes are not those of `sha256`.
    """
    if path.exists():
        found = sha256_file(path)
        if sha256 in (None, found):
            return found
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with requests.Session() as session:
        session.max_redirects = MOST_REDIRECTS
        _persist(session, url, partial, sleep)
    found = sha256_file(partial)
    if sha256 not in (None, found):
        _discard(partial)
    check_sha256(found, sha256, url)
    os.replace(partial, path)
    _discard(partial)
    return found


def check_sha256(found: str, expected: str | None, name: str) -> str:
    """Return `found`.  Raises UserError where something else was expected."""
    if expected not in (None, found):
        raise UserError(
            f"{name} has sha256 {found}, expected {expected}: its bytes are not the right ones, or have changed"
        )
    return found


def _persist(session: requests.Session, url: str, partial: Path, sleep: Callable[[float], None]) -> None:
    """Transfer again until the file is whole or ATTEMPTS in a row bring nothing."""
    failures = furthest = 0
    while True:
        try:
            return _transfer(session, url, partial)
        except TRANSIENT as error:
            size = _size(partial)
            failures = 1 if size > furthest else failures + 1
            furthest = max(size, furthest)
            if failures == ATTEMPTS:
                raise UserError(
                    f"cannot download {url} ({_reason(error)}): check the network and run again, "
                    f"it goes on after {human_bytes(size)}"
                ) from None
            sleep(BACKOFF_S * 2 ** (failures - 1))
        except requests.RequestException as error:  # no http address, too many redirects
            raise UserError(f"cannot download {url} ({_reason(error)})") from None


def _transfer(session: requests.Session, url: str, partial: Path) -> None:
    """One request: the whole file, or what is missing of `partial`."""
    state = _load_state(partial, url)
    offset = _size(partial) if state["validator"] else 0
    if offset and offset == state["total"]:
        return  # killed between the last byte and the renaming
    headers = {"Accept-Encoding": "identity"}  # so that lengths and offsets count the file's own bytes
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": state["validator"]}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        offset = _check_answer(response, url, partial, offset)
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdigit() and not encoded else None
        if not offset:
            partial.unlink(missing_ok=True)  # before its new state is written
            _save_state(partial, url, None if encoded else _validator(response), total)
        _check_room(partial, offset, total, url)
        _receive(response, partial, offset, total)
    if total is not None and _size(partial) != total:
        raise _InterruptedError(f"it ended after {_size(partial)} of {total} bytes")


def _check_answer(response: requests.Response, url: str, partial: Path, offset: int) -> int:
    """Where in the file the body of this answer begins."""
    status = response.status_code
    if status == 416:  # we asked for bytes after the end: what we have is not of this file
        _discard(partial)
    if status in BUSY or status == 416 or status >= 500:
        raise _InterruptedError(f"the server answered {status} {response.reason}")
    if status not in (200, 206):
        raise NotThereError(f"cannot download {url}: the server answered {status} {response.reason}")
    if status == 200:  # it does not know ranges, or the file has changed
        return 0
    begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if not begin or int(begin[1]) != offset:
        _discard(partial)
        raise _InterruptedError("the server sent another part than was asked for")
    return offset


def _receive(response: requests.Response, partial: Path, offset: int, total: int | None) -> None:
    name = partial.name.removesuffix(".partial")
    with open(partial, "ab" if offset else "wb") as file, progress(name, total=total, unit="B", start=offset) as bar:
        for chunk in response.iter_content(CHUNK_BYTES):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                error.filename = str(partial)  # a full disk is reported by write(), which knows no name
                raise
            bar.update(len(chunk))


def _check_room(partial: Path, offset: int, total: int | None, url: str) -> None:
    free = shutil.disk_usage(partial.parent).free
    if total is not None and total - offset > free:
        raise UserError(
            f"{url} needs {human_bytes(total - offset)} in {partial.parent}, {human_bytes(free)} are free: make room"
        )


def _validator(response: requests.Response) -> str | None:
    """What distinguishes this version of the file from others: a strong ETag, else its date."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _state_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _load_state(partial: Path, url: str) -> dict[str, Any]:
    try:
        state = json.loads(_state_path(partial).read_bytes())
    except (FileNotFoundError, ValueError):
        state = None
    if isinstance(state, dict) and state.get("url") == url and {"validator", "total"} <= state.keys():
        return state
    return {"validator": None, "total": None}


def _save_state(partial: Path, url: str, validator: str | None, total: int | None) -> None:
    write_json(_state_path(partial), {"url": url, "validator": validator, "total": total})


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _state_path(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    """The innermost cause in words: `Connection refused` rather than four wrapped objects."""
    inner: object = error
    while isinstance(inner, Exception):
        error = inner
        inner = getattr(error, "reason", None) or next((arg for arg in error.args if isinstance(arg, Exception)), None)
    return " ".join(str(error).rpartition("): ")[2].split())  # without the name of an object before it


def fetch_bucket(source: str, cache: Path) -> list[tuple[str, Path]]:
    """Copy the files of an address, a folder's or a glob's, into `cache`.  -> (name, path) of each, sorted by name

    A file that was copied before and has the same size and checksum there is not copied again. Raises UserError where
    the address names nothing, is refused, or needs a package that is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(source)
        found = files.glob(path) if fsspec.core.has_magic(path) else files.find(path)
        base = PurePosixPath(os.path.commonpath([str(PurePosixPath(name).parent) for name in found]) if found else "")
        copies = []
        for name in sorted(found):
            mark = hashlib.sha256(f"{source} {name} {files.ukey(name)}".encode()).hexdigest()[:16]
            copy = cache / f"{mark}-{PurePosixPath(name).name}"
            if not copy.exists():
                _copy(files, name, copy)
            copies.append((str(PurePosixPath(name).relative_to(base)), copy))
    except (ImportError, ValueError) as error:  # no such protocol, or a package that is missing for it
        raise UserError(f"download.source={source}: {error}") from None
    except FileNotFoundError:
        copies = []
    except OSError as error:
        if error.filename and str(cache) in str(error.filename):
            raise
        raise UserError(
            f"download.source={source} cannot be read ({error}): check the address and your rights"
        ) from None
    if not copies:
        raise UserError(f"download.source={source} names no files")
    return copies


def _copy(files: fsspec.AbstractFileSystem, name: str, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(copy.name + ".partial")
    total = files.size(name)
    with (
        files.open(name, "rb") as source,
        open(partial, "wb") as target,
        progress(PurePosixPath(name).name, total=total, unit="B") as bar,
    ):
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
            bar.update(len(chunk))
    os.replace(partial, copy)
