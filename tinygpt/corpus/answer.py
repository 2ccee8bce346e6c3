"""A web server's response to a download: what it says about the file, and whether it is that file.

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

BUSY = {408, 425, 429}  # client errors worth a retry, as every 5xx is
PAGES = ("", ".html", ".htm", ".xhtml", ".php", ".asp", ".aspx", ".jsp")  # suffixes of files that may be HTML
HTML = ("text/html", "application/xhtml+xml")


class NotThereError(UserError):
    """The server did not send the file, and a retry would not help."""


class BrokenOffError(Exception):
    """The transfer failed, but a retry may succeed."""


@dataclass(frozen=True)
class Version:
    """The version of a file that a partial download belongs to."""

    url: str | None = None
    validator: str | None = None
    total: int | None = None  # bytes


@dataclass(frozen=True)
class Answer:
    """The response to a request for the file at `url`, from byte `offset` on."""

    response: requests.Response
    url: str
    offset: int

    @property
    def is_whole(self) -> bool:
        """Whether the body starts at byte 0: a new download, a changed file, or a server without ranges."""
        return self.response.status_code == 200

    @property
    def validator(self) -> str | None:
        """What identifies this version of the file: a strong ETag, else its date."""
        etag = self.response.headers.get("ETag")
        return etag if etag and not etag.startswith("W/") else self.response.headers.get("Last-Modified")

    @property
    def length(self) -> int | None:
        """Bytes of the body; None if Content-Length is missing, invalid, or overridden by Transfer-Encoding."""
        length = self.response.headers.get("Content-Length", "")
        is_valid = re.fullmatch("[0-9]{1,30}", length) and "Transfer-Encoding" not in self.response.headers
        return int(length) if is_valid else None

    @property
    def is_packed(self) -> bool:
        """Whether the server compressed the body, though it was asked not to."""
        return self._encoding != "identity"

    @property
    def _encoding(self) -> str:
        return self.response.headers.get("Content-Encoding", "").strip().lower() or "identity"

    def check(self, name: str) -> None:
        """Raises BrokenOffError for a response worth a retry, NotThereError for one that is not the file."""
        status = self.response.status_code
        says = f"the server answered {status} {client.responses.get(status, '')}".strip()
        if status in BUSY or status >= 500:
            raise BrokenOffError(says)
        if self.offset and status == 416:
            return  # there is no such range; the body may be an error page
        if status != 200 and not (self.offset and status == 206):  # 206 answers only a range request
            raise self.refuse(says)
        kind = self.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in HTML and PurePosixPath(name).suffix.lower() not in PAGES:
            raise self.refuse(
                f"the server sent a web page, perhaps a login: download {name} yourself and set download.source to "
                "that file"
            )
        if self._encoding not in ("identity", "gzip", "x-gzip"):
            raise self.refuse("the server compressed the file with something other than gzip")
        if self.length == 0:
            raise self.refuse("the server sent an empty file")

    def continues(self, version: Version) -> bool:
        """Whether the body continues that version of the file at `offset`; it may stop before the end."""
        part = rf"bytes {self.offset}-[0-9]+/{version.total}"
        is_next = re.fullmatch(part, self.response.headers.get("Content-Range", "")) is not None
        return is_next and self.validator == version.validator and not self.is_packed

    def refuse(self, reason: str) -> NotThereError:
        """The error for a response that is not the file."""
        return NotThereError(f"cannot download {self.url}: {reason}")


def leave_body(response: requests.Response, **_: Any) -> None:
    """Close a redirect unread: requests would read its whole body, however long."""
    if response.is_redirect:
        response.close()
