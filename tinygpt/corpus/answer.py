"""What a web server's answer says about a file, and whether it is that file.

HTTP: https://www.rfc-editor.org/rfc/rfc9110 (ranges in chapter 14). Servers get all of it wrong at times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import client
from pathlib import PurePosixPath
from typing import Any

import requests

from tinygpt.errors import UserError

BUSY = {408, 425, 429}  # client errors that pass; every 5xx is one too
PAGES = ("", ".html", ".htm", ".xhtml", ".php", ".asp", ".aspx", ".jsp")  # endings of names that HTML may have
HTML = ("text/html", "application/xhtml+xml")


class NotThereError(UserError):
    """The server's answer is not this file, and will not be when it is asked again."""


class BrokenOffError(Exception):
    """The transfer failed in a way that may pass."""


@dataclass(frozen=True)
class Version:
    """What is known of the file that a partial download is of."""

    url: str | None = None
    validator: str | None = None
    total: int | None = None  # bytes


@dataclass(frozen=True)
class Answer:
    """An answer to the request for the bytes from `offset` on of the file at `url`."""

    response: requests.Response
    url: str
    offset: int

    @property
    def is_whole(self) -> bool:
        """Whether the body begins where the file does: it is new, has changed, or the server knows no ranges."""
        return self.response.status_code == 200

    @property
    def validator(self) -> str | None:
        """What distinguishes this version of the file from others: a strong ETag, else its date."""
        etag = self.response.headers.get("ETag")
        return etag if etag and not etag.startswith("W/") else self.response.headers.get("Last-Modified")

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the server says so in a way that counts."""
        length = self.response.headers.get("Content-Length", "")
        is_valid = re.fullmatch("[0-9]{1,30}", length) and "Transfer-Encoding" not in self.response.headers
        return int(length) if is_valid else None

    @property
    def is_packed(self) -> bool:
        """Whether the body is a gzip of the file, though nobody asked for it."""
        return self._encoding != "identity"

    @property
    def _encoding(self) -> str:
        return self.response.headers.get("Content-Encoding", "").strip().lower() or "identity"

    def check(self, name: str) -> None:
        """Raises BrokenOffError where the server should be asked again, else NotThereError for what is not a file."""
        status = self.response.status_code
        says = f"the server answered {status} {client.responses.get(status, '')}".strip()
        if status in BUSY or status >= 500:
            raise BrokenOffError(says)
        if self.offset and status == 416:
            return  # it has no such part, and may send a page to say so
        if status != 200 and not (self.offset and status == 206):  # a part counts only where it was asked for
            raise self.refuse(says)
        kind = self.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in HTML and PurePosixPath(name).suffix.lower() not in PAGES:
            raise self.refuse(
                f"the server sent a web page, perhaps to log in: get {name} by hand, name it as the source"
            )
        if self._encoding not in ("identity", "gzip", "x-gzip"):
            raise self.refuse("the server compressed it unasked, and not with gzip")
        if self.length == 0:
            raise self.refuse("the server sent an empty file")

    def continues(self, version: Version) -> bool:
        """Whether the body is the rest of that version of the file, or begins it."""
        part = rf"bytes {self.offset}-[0-9]+/{version.total}"
        is_next = re.fullmatch(part, self.response.headers.get("Content-Range", "")) is not None
        return is_next and self.validator == version.validator and not self.is_packed

    def refuse(self, reason: str) -> NotThereError:
        """The error for an answer that is not the file."""
        return NotThereError(f"cannot download {self.url}: {reason}")


def leave_body(response: requests.Response, **_: Any) -> None:
    """Read nothing of a redirect: requests would take all of its body, however long."""
    if response.is_redirect:
        response.close()
