"""The server: the routes of OpenAI's API and of the page, limits on clients, and a clean shutdown."""

import asyncio
import ctypes
import ipaddress
import logging
import signal
import socket
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygpt.errors import Stopped, UserError
from tinygpt.options import Limits
from tinygpt.serve.choices import describe, explain
from tinygpt.serve.request import Refusal, find_model
from tinygpt.serve.service import Service, complete, json_bytes, json_response, unless_gone

PAGE = Path(__file__).with_name("page")
HEADERS = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("cache-control", "no-cache"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
]
PIECE = 2**16  # at most so many bytes of an answer wait to be sent
REST_SECONDS = 3  # after so long without a request, freed memory goes back to the system


def build_app(service: Service, hosts: Sequence[str]) -> ASGIApp:
    """The whole server; `hosts` are names that clients may use for it, besides localhost and IP addresses."""

    async def completions(request: Request) -> ASGIApp:
        is_chat = "chat" in request.url.path
        return await unless_gone(request, complete(service, await service.body(request), is_chat=is_chat))

    async def models(request: Request) -> Response:
        listed = [describe(served, service.created) for served in service.models.values()]
        return json_response({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        return json_response(describe(find_model(request.path_params["name"], service.models), service.created))

    async def health(request: Request) -> Response:
        return json_response({"status": "ok"} | service.worker.counts())

    async def look(request: Request) -> Response:
        raw = await service.body(request)
        made = service.aside(lambda: json_bytes(explain(raw, service.models)))  # may be megabytes
        return Response(await unless_gone(request, made), media_type="application/json")

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/look", look, methods=["POST"]),
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    refused = (Refusal, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(refused, refuse))
    return Guard(app, service.limits, hosts)


async def refuse(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's form."""
    match error:
        case Refusal():
            return refusal_response(error)
        case HTTPException():  # no such route
            refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
            return refusal_response(refusal, error.headers)
        case ClientDisconnect():
            return Response(status_code=499)  # nobody reads it
        case _:
            return refusal_response(Refusal(500, "internal error: the server's log has the details"))


def refusal_response(refusal: Refusal, more: Mapping[str, str] | None = None) -> Response:
    """A refusal; it closes the connection if the request may not have been read to its end."""
    headers = dict(more or {})
    headers |= {"retry-after": "1"} if refusal.status in (429, 503) else {}
    headers |= {"connection": "close"} if refusal.status in (403, 408, 413, 503) else {}
    return json_response(refusal.body(), refusal.status, headers)


class Guard:
    """Decides which clients may use the server, and how many at a time.

    A page of another site cannot use its visitor's server. The browser sends the page's origin, which must be ours,
    and the host it believes it is talking to, which must be an IP address or one of our names: this refuses a foreign
    name that was made to point here (DNS rebinding). Starlette's TrustedHostMiddleware accepts only addresses that it
    was given, and its CORSMiddleware lets such requests in.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Sequence[str]) -> None:
        self._app, self._most, self._n_running = app, limits.max_requests, 0
        self._resting: asyncio.TimerHandle | None = None
        self._hosts = {"localhost", *(without_port(host) for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal(Headers(scope=scope)):
            return await refusal_response(refusal)(scope, receive, send)

        async def send_pieces(message: Message) -> None:
            body = memoryview(message.get("body", b""))
            while len(body) > PIECE:  # the client must read each piece in time
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
        """If nothing is running, give freed memory, which glibc keeps, back to the system."""
        self._resting = None
        if not self._n_running:
            with suppress(AttributeError, OSError, TypeError):  # another C library, or system
                ctypes.CDLL(None).malloc_trim(0)

    def _refusal(self, headers: Headers) -> Refusal | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_known(host, self._hosts):
            name = without_port(host[:100]) or "NAME"
            return Refusal(403, f"this server does not answer to the name {name}: add --allow-host {name}")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return Refusal(403, f"pages of {origin[:100]} may not use this server")
        if self._n_running >= self._most:
            return Refusal(503, f"{self._n_running} requests are running: try again later", code="too_many_requests")
        return None


def is_known(host: str, names: set[str]) -> bool:
    """Whether a Host header, with or without a port, is an IP address or one of these names."""
    name = without_port(host)
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name in names
    return True


def without_port(host: str) -> str:
    """A host's name in small letters, as in the Host header: `[::1]:8000` -> `[::1]`."""
    name, _, port = host.lower().rpartition(":")
    return name if port.isdecimal() else host.lower()


class Connection(H11Protocol):
    """A connection that is closed if the head of its next request is late, or if the client does not read in time.

    uvicorn's timer starts after an answer and ends with the next byte: a connection that never sends a whole head would
    stay. It has none for a client that does not read, nor does it notice one that leaves after its next request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # call pause_writing as soon as anything has to wait
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Keep reading, and let the timer run to the end of a head.  What comes during an answer waits, up to PIECE."""
        self.conn.receive_data(data)
        if self.conn.their_state not in (h11.DONE, h11.MUST_CLOSE):
            self.handle_events()
        elif len(self.conn.trailing_data[0]) > PIECE:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has a head of more than 16 kB, unless another answer has begun."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Close the connection, and free all it holds, unless the client reads what waits for it in time."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread.cancel()
        super().resume_writing()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises UserError if the port is in use, or the host is not this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)  # Linux would buffer megabytes
        listener.bind(address)
        listener.listen(1024)  # while it is only bound, a second server could bind it too
    except (OSError, UnicodeError) as error:  # the latter for a name such as "a..b"
        why = error.strerror if isinstance(error, OSError) else "no name of a machine"
        problem = f"cannot listen on {host}, port {port} ({why})"
        raise UserError(f"{problem}: choose another --port, or an address of this machine as --host") from None
    return listener


class Server(uvicorn.Server):
    """A server that ends its answers when it is asked to stop."""

    def __init__(self, service: Service, hosts: Sequence[str]) -> None:
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
            limit_concurrency=2 * service.limits.max_requests,  # connections, idle ones too
            timeout_keep_alive=service.limits.client_seconds,  # at uvicorn's 5 s, also httpx's, requests were lost
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Ctrl-C and SIGTERM."""
        # later, as the interrupted code may hold locks
        asyncio.get_running_loop().call_soon_threadsafe(self._service.stop)
        super().handle_exit(sig, frame)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the worker, and serve until the end."""
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
