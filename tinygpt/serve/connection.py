"""A client's connection: how long it may take to send and to read, and what is answered to what is not HTTP."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygpt.serve.limits import PIECE, Refusal
from tinygpt.serve.service import json_bytes


class Connection(H11Protocol):
    """A connection that is closed when the head of its next request is late, or what was sent is not read in time.

    uvicorn's timer begins after an answer and ends with the next byte: a connection that never sends a whole head
    would stay. It has none for a client that does not read, and no longer sees one go that has sent its next request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing comes as soon as anything has to wait
        self._unread: asyncio.TimerHandle | None = None
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Read on, without an end of the timer; what comes before an answer is whole waits, up to a piece."""
        self.conn.receive_data(data)
        if self.conn.their_state not in (h11.DONE, h11.MUST_CLOSE):
            self.handle_events()
        elif len(self.conn.trailing_data[0]) > PIECE:
            self.transport.abort()

    def handle_events(self) -> None:
        """End the timer with a whole head."""
        last = self.cycle
        super().handle_events()
        if self.cycle is not last:
            self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or has a head of more than 16 kB, is told as all errors are, in place of any answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json_bytes(Refusal(400, msg).body())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close")]
        for part in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """The client must read what waits for it, or it is let go with all that it holds."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read all."""
        self._stop_unread()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_unread()
        super().connection_lost(exc)

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
