"""Run the app: its socket, its threads, and a clean end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import types
from collections.abc import Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tinygpt.errors import Stopped, UserError
from tinygpt.serve.app import build_app
from tinygpt.serve.service import Service


def listen(host: str, port: int) -> socket.socket:
    """A socket at this place.  Raises UserError when it is taken, or is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # bound alone, a second server could bind it too
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use: stop who uses it, or give another one by --port"
            ) from None
        raise UserError(f"cannot listen at {host}, port {port} ({error.strerror})") from None
    return listener


class Connection(H11Protocol):
    """A connection that is closed when the head of its next request does not come in time.

    uvicorn's own timer begins after an answer and ends with the next byte: a connection that never sends a whole head
    would stay.
    """

    read_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        """Wait for the next one."""
        self._await_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def _await_head(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.read_seconds, self._give_up, self.cycle)

    def _give_up(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:  # no request came after it
            self.timeout_keep_alive_handler()


class Server(uvicorn.Server):
    """A server whose answers end when it is asked to stop."""

    def __init__(self, service: Service, hosts: Sequence[str]) -> None:
        """`hosts` are names that it may be called by, besides localhost and addresses."""
        config = uvicorn.Config(
            build_app(service, hosts),
            loop="asyncio",
            http=type("Connection", (Connection,), {"read_seconds": service.limits.read_seconds}),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=2 * service.limits.max_requests,  # connections, also those that ask nothing
            # as Connection has it; uvicorn's 5 s are also httpx's and the openai client's, who lost requests by it
            timeout_keep_alive=service.limits.read_seconds,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Ctrl-C and SIGTERM."""
        asyncio.get_running_loop().call_soon_threadsafe(
            self._service.stop
        )  # not here: who was interrupted may hold locks
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
