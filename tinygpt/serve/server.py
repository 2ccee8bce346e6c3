"""The server: the routes of OpenAI's completions and of the page, who may ask, and a clean end."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import signal
import socket
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.errors import Stopped, UserError
from tinygpt.serve.chat import read_chat
from tinygpt.serve.choices import candidates, seen_before, token_text
from tinygpt.serve.connection import Connection
from tinygpt.serve.limits import PIECE, Limits, Refusal
from tinygpt.serve.request import Served, check_ids, find_model, read_completion, read_object
from tinygpt.serve.service import Service, complete, json_response, unless_gone

PAGE = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name.replace("index.html", ""): path for path in PAGE.iterdir() if path.suffix in KINDS}
HEADERS = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
]
N_ALTERNATIVES = 20
REST_SECONDS = 3  # without a request, after which memory is given back
READ = ["GET", "HEAD"]


def build_app(service: Service, hosts: Sequence[str]) -> ASGIApp:
    """The whole server; `hosts` are names that it may be called by, in addition to localhost and addresses."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return refusal_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return refusal_response(refusal, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal_response(Refusal(500, "the server made a mistake: its log has the details"))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await unless_gone(request, complete(service, await service.body(request), read_completion))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await unless_gone(request, complete(service, await service.body(request), read_chat))

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        listed = [describe(served, service) for served in service.models.values()]
        return json_response({"object": "list", "data": listed})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        return json_response(describe(find_model(name, service.models), service))

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        return json_response({"status": "ok"} | service.worker.counts())

    @app.post("/look")
    async def look(request: Request) -> Response:
        raw = await service.body(request)
        return json_response(await unless_gone(request, service.aside(explain, raw, service)))

    @app.api_route("/", methods=READ)
    @app.api_route("/{name}", methods=READ)
    async def page(name: str = "") -> Response:
        if name not in FILES:
            raise HTTPException(404, "Not Found")
        path = FILES[name]
        return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers={"cache-control": "no-cache"})

    return Guard(app, service.limits, hosts)


def explain(raw: bytes, service: Service) -> dict[str, Any]:
    """For the page: what might have followed `prompt` and `text`, both ids, and the id that was `taken`; and what
    each head attended to.
    """
    document = read_object(raw)
    name = document.get("model")
    served = find_model(name if isinstance(name, str) else None, service.models)
    prompt, text, taken = document.get("prompt"), document.get("text", []), document.get("taken")
    for key, ids in {"prompt": prompt, "text": text, "taken": [] if taken is None else [taken]}.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or (key == "prompt" and not ids):
            raise Refusal(400, f"{key} must be {'an id' if key == 'taken' else 'a list of ids'}", param=key)
        check_ids(key, ids, served)
    assert isinstance(prompt, list)
    seen = seen_before(prompt, text, served.model.config.block_size)
    best, weights = candidates(served.model, seen, N_ALTERNATIVES, taken)
    return {
        "alternatives": [{"id": i, "token": token_text(served.tokenizer, i), "p": p} for i, p in best],
        "tokens": [token_text(served.tokenizer, i) for i in seen],
        "attention": weights.astype(float).round(4).tolist(),
    }


def describe(served: Served, service: Service) -> dict[str, Any]:
    """A model as OpenAI's list has it, and what a page needs to know of it."""
    config = served.model.config
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "block_size")}
    head = {"id": served.name, "object": "model", "created": service.created, "owned_by": "tinygpt"}
    return head | {"n_weight": served.n_weight} | sizes


class Guard:
    """Who may ask, and how many at a time.

    A page of another site cannot use the server of who visits it: a browser names the page's origin, which must be
    ours, and the host it believes to speak to, which must be an address or a name of ours, so that a foreign name
    that is made to point here (DNS rebinding) is refused. Starlette's TrustedHostMiddleware takes no address that it
    was not given, and its CORSMiddleware lets such requests in.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Sequence[str]) -> None:
        self._app, self._most, self._n_running = app, limits.max_requests, 0
        self._resting: asyncio.TimerHandle | None = None
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if refusal := self._refusal(Headers(scope=scope)):
            return await refusal_response(refusal)(scope, receive, send)

        async def send_pieces(message: Message) -> None:
            body = memoryview(message.get("body", b""))
            while len(body) > PIECE:  # a client must take each in time
                await send(dict(message) | {"body": bytes(body[:PIECE]), "more_body": True})
                body = body[PIECE:]
            await send(dict(message) | {"body": bytes(body)} if body.nbytes else message)

        self._n_running += 1
        try:
            await self._app(scope, receive, send_pieces)
        finally:
            self._n_running -= 1
            if not (self._n_running or self._resting):
                self._resting = asyncio.get_running_loop().call_later(REST_SECONDS, self._rest)

    def _rest(self) -> None:
        """Give memory back to the system that was freed, which glibc keeps, where nothing is at work."""
        self._resting = None
        if not self._n_running:
            with suppress(AttributeError, OSError, TypeError):  # another C library, or system
                ctypes.CDLL(None).malloc_trim(0)

    def _refusal(self, headers: Headers) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_known(host, self._hosts):
            return Refusal(403, f"this server is not called {host[:100]!r}: --allow-host adds a name")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return Refusal(403, f"pages of {origin[:100]!r} may not use this server")
        if self._n_running >= self._most:
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


def refusal_response(refusal: Refusal, more: Mapping[str, str] | None = None) -> Response:
    """A refusal; the connection is closed where the request may not have been read whole."""
    headers = dict(more or {})
    headers |= {"retry-after": "1"} if refusal.status in (429, 503) else {}
    headers |= {"connection": "close"} if refusal.status in (403, 408, 413, 503) else {}
    return json_response(refusal.body(), refusal.status, headers)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this place.  Raises UserError when it is taken, or is not one of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)  # Linux would take megabytes that nobody reads
        listener.bind(address)
        listener.listen(1024)  # bound alone, a second server could bind it too
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: stop that program, or choose another --port") from None
        raise UserError(f"cannot listen at {host}, port {port} ({error.strerror})") from None
    return listener


class Server(uvicorn.Server):
    """A server whose answers end when it is asked to stop."""

    def __init__(self, service: Service, hosts: Sequence[str]) -> None:
        """`hosts` are names that it may be called by, in addition to localhost and addresses."""
        config = uvicorn.Config(
            build_app(service, hosts),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=HEADERS,
            limit_concurrency=2 * service.limits.max_requests,  # connections, also those that ask nothing
            timeout_keep_alive=service.limits.client_seconds,  # uvicorn's 5 s are also httpx's: it lost requests by it
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Ctrl-C and SIGTERM."""
        # not here: who was interrupted may hold locks
        asyncio.get_running_loop().call_soon_threadsafe(self._service.stop)
        super().handle_exit(sig, frame)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, with the worker, until the end."""
        self._service.worker.start()
        try:
            super().run(sockets)
        finally:
            self._service.close()


def serve(service: Service, listener: socket.socket, hosts: Sequence[str]) -> None:
    """Serve until Ctrl-C or SIGTERM."""

    def stopped(number: int, frame: types.FrameType | None) -> None:
        raise Stopped(number, "stopped")

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a client that has just left
    signal.signal(signal.SIGTERM, stopped)  # uvicorn raises it again when all is closed
    Server(service, hosts).run([listener])
