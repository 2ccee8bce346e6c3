"""What stands before every route: who may ask, how many at a time, and what browsers are told."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.serve.limits import Limits, Refusal

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """An app behind these checks.

    A page of another site cannot use the server of who visits it: a browser names the page's origin, which must be
    ours, and the host it believes to speak to, which must be an address or a name of ours, so that a foreign name
    that is made to point here (DNS rebinding) is refused.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Sequence[str]) -> None:
        self._app, self._limits = app, limits
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._n_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal:
            return await refusal_response(refusal)(scope, receive, send_with_headers)
        self._n_running += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._n_running -= 1
        return None

    def _refusal(self, headers: Headers) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_known(host, self._hosts):
            return Refusal(403, f"this server is not called {host[:100]!r}: --allow-host adds a name")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return Refusal(403, f"pages of {origin[:100]!r} may not use this server")
        if self._n_running >= self._limits.max_requests:
            return Refusal(503, f"{self._n_running} requests are at work: try again later", code="too_many_requests")
        return None


def is_known(host: str, names: set[str]) -> bool:
    """Whether a Host header, with or without a port, has an address or one of these names."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name.lower() in names
    return True


def refusal_response(refusal: Refusal) -> Response:
    """A refusal; the connection is closed where the request may not have been read whole."""
    headers = {"retry-after": "1"} if refusal.status in (429, 503) else {}
    headers |= {"connection": "close"} if refusal.status in (403, 408, 413, 503) else {}
    return Response(json_bytes(refusal.body()), refusal.status, headers, "application/json")


def json_bytes(content: Any) -> bytes:
    """JSON in ASCII, without spaces."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
