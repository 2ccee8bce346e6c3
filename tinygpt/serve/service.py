"""From a request for a completion to its answer, whole or as a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tinygpt.options import Limits
from tinygpt.serve.choices import ChatChoice, Choice, Scores, score, usage
from tinygpt.serve.request import Completion, Refusal, Served, read_request
from tinygpt.serve.worker import Job, Update, Worker, stopping

T = TypeVar("T")


class Service:
    """What the routes share."""

    def __init__(self, models: Sequence[Served], limits: Limits) -> None:
        self.models = {served.name: served for served in models}
        self.limits, self.worker = limits, Worker({s.name: s.model for s in models}, limits)
        self.created = int(time.time())
        self._reader = ThreadPoolExecutor(1)  # reads and scores prompts while the event loop runs
        self._writer = ThreadPoolExecutor(1)  # writes the JSON of long answers

    def stop(self) -> None:
        """Refuse all waiting requests, as the server ends."""
        self.worker.stop()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the threads."""
        self.stop()
        self.worker.join()
        self._reader.shutdown()
        self._writer.shutdown(cancel_futures=True)

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Do some work in the reader's thread, unless its client has left by then."""
        try:
            return await asyncio.wrap_future(self._reader.submit(work, *args))
        except (asyncio.CancelledError, RuntimeError):
            if self.worker.is_stopped:  # and so is the reader
                raise stopping() from None
            raise

    async def written(self, make: Callable[[], T]) -> T:
        """Make a long part of an answer in the writer's thread."""
        return await asyncio.wrap_future(self._writer.submit(make))

    async def body(self, request: Request) -> bytes:
        """The body of a request.  Raises Refusal if it is too large, or comes too slowly."""
        raw, most, seconds = bytearray(), self.limits.max_body, self.limits.client_seconds
        message = f"the request is larger than {most:,} bytes, the limit of this server"
        too_large = Refusal(413, message, code="request_too_large")
        if int(request.headers.get("content-length", 0)) > most:  # uvicorn has refused anything but a number
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    raw += part
                    if len(raw) > most:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {seconds} seconds") from None
        return bytes(raw)

    def begin(self, asked: Completion) -> tuple[Job, asyncio.Queue[list[Update] | Refusal]]:
        """Give a request to the worker; updates arrive in the queue."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[list[Update] | Refusal]()

        def report(news: list[Update] | Refusal) -> None:
            if not (asked.body.stream or isinstance(news, Refusal)):
                news = [update for update in news if update.finish_reason]
            if news:
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(updates.put_nowait, news)

        job = Job(asked.served.name, asked.answers, report)
        self.worker.submit(job)
        return job, updates


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled if the client leaves.  The request must have been read.

    Raises ClientDisconnect if the client leaves.
    """
    working, leaving = asyncio.create_task(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def complete(service: Service, raw: bytes, *, is_chat: bool) -> ASGIApp:
    """Answer a completion or a chat, whole or as a stream."""
    asked = await service.aside(partial(read_request, raw, service.models, service.limits, is_chat=is_chat))
    del raw  # it may be as large as max_body, and an answer takes long
    n_best, scores = asked.body.logprobs, list[Scores]()
    if asked.body.echo and n_best is not None:
        scores = [await service.aside(score, asked.served.model, prompt.ids, n_best) for prompt in asked.prompts]
    make = ChatChoice if asked.is_chat else Choice
    choices = [make(i, asked, scores[i // asked.body.n] if scores else None) for i in range(len(asked.answers))]
    if asked.body.max_tokens > 0:
        job, updates = service.begin(asked)
        if asked.body.stream:
            response = StreamingResponse(events(service, asked, choices, updates), media_type="text/event-stream")

            async def send_events(scope: Scope, receive: Receive, send: Send) -> None:
                try:
                    await response(scope, receive, send)
                finally:  # all have been sent, or the client has left
                    service.worker.drop(job)

            return send_events
        try:
            n_left = len(choices)
            while n_left:
                n_left -= len(raised(await updates.get()))
        finally:
            service.worker.drop(job)
    parts = whole(service, asked, choices)
    if is_long(asked):
        return StreamingResponse(parts, media_type="application/json")
    return Response(b"".join([part async for part in parts]), media_type="application/json")


def is_long(asked: Completion) -> bool:
    """Whether the JSON of an answer takes time to write: it has an entry for each token, or the prompt."""
    return asked.body.logprobs is not None or asked.body.echo


def head_of(asked: Completion) -> dict[str, Any]:
    """What each object of an answer begins with."""
    kind = f"chat.completion{'.chunk' if asked.body.stream else ''}" if asked.is_chat else "text_completion"
    name = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.served.name}


async def whole(service: Service, asked: Completion, choices: list[Choice]) -> AsyncIterator[bytes]:
    """The answers as one object; the JSON of only one of them is in memory at a time."""
    yield json_bytes(head_of(asked))[:-1] + b',"choices":['
    for choice in choices:
        make = partial(lambda each: json_bytes(each.whole()), choice)
        yield (b"," if choice.index else b"") + (await service.written(make) if is_long(asked) else make())
    yield b'],"usage":' + json_bytes(usage(asked)) + b"}"


async def events(
    service: Service, asked: Completion, choices: list[Choice], updates: asyncio.Queue[list[Update] | Refusal]
) -> AsyncIterator[bytes]:
    """The answers as they come: an event for each answer that a step has extended."""
    head, n_left = head_of(asked), len(choices)
    has_usage = asked.body.stream_options is not None and asked.body.stream_options.include_usage
    empty = {"usage": None} if has_usage else {}

    def made(update: Update) -> bytes | None:
        part = choices[update.index].take(update.piece, update.n_ids, update.finish_reason)
        return event(head | {"choices": [part]} | empty) if part else None

    try:
        while n_left:
            for update in raised(await updates.get()):
                echoes = asked.body.echo and not choices[update.index].has_begun
                part = await service.written(partial(made, update)) if echoes else made(update)
                if part:
                    yield part
                n_left -= update.finish_reason is not None
            await asyncio.sleep(0)  # even if many updates wait, let other tasks run and notice a client that leaves
    except Refusal as error:
        yield event(error.body())
        return
    if has_usage:
        yield event(head | {"choices": [], "usage": usage(asked)})
    yield b"data: [DONE]\n\n"


def raised(news: list[Update] | Refusal) -> list[Update]:
    """The updates; raises a Refusal that came in their place."""
    if isinstance(news, Refusal):
        raise news
    return news


def json_bytes(content: Any) -> bytes:
    """JSON in ASCII, which can hold even half a surrogate pair, without spaces."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with this content as JSON."""
    return Response(json_bytes(content), status, headers, "application/json")


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(content) + b"\n\n"
