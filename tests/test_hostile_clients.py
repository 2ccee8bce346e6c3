"""Clients that send nonsense, ask for much, never read, or leave: errors have one form, and no resources are lost."""

import asyncio
import json
import random
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from serving import FIRST, running, wait_until

from tinygpt.options import Limits
from tinygpt.serve.request import Served
from tinygpt.serve.server import PIECE, REST_SECONDS, build_app
from tinygpt.serve.service import Service
from tinygpt.tokenizer import Tokenizer

N_MALFORMED = 1800
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "first",
        "prompt": "the file",
        "max_tokens": 2,
        "n": 1,
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop": ["e"],
        "logprobs": 1,
        "echo": False,
        "logit_bias": {"5": 1},
        "stop_ids": [1],
        "stream_options": None,
        "when_full": "slide",
    },
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "max_completion_tokens": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "tools": None,
        "response_format": {"type": "text"},
        "stop": "e",
    },
    "/look": {"prompt": [1, 2], "text": [3], "taken": 4, "model": "first"},
}
NASTY: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, "", "a", "\0", "\ud800", "😀" * 9,
    "<|endoftext|>", "x" * 9000, "\udc80a", [], [[]], [None], [1], [-1], [True], [1.0], ["a", 1], [[1], "a"],
    ["\udfff"], [10**30], {}, {"a": 1}, {"type": "image_url"}, [{}], [{"role": "user"}], [["a"] * 50],
    [{"role": [], "content": {}}],
    [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a", "tool_calls": [1]}], {"": {"": {}}},
]  # fmt: skip


def malformed(random: random.Random) -> tuple[str, bytes]:
    """A path and a request with a few things wrong in it; now and then it is still valid."""
    path = random.choice(list(VALID))
    document = dict(VALID[path])
    for _ in range(random.randint(1, 3)):
        key = random.choice([*document, random.choice(["best_of", "echo", "stream", "x" * 99, "", "\ud800"])])
        document[key] = random.choice(NASTY)
        if random.random() < 0.2:
            del document[key]
    raw = json.dumps(document, ensure_ascii=random.random() < 0.8).encode(errors="surrogatepass")
    at = random.randrange(len(raw))
    damages = [
        raw[:at],
        raw[:at] + bytes([random.randrange(256)]) + raw[at + 1 :],
        raw[:at]
        + random.choice([b"NaN", b"-Infinity", b"9" * 5000, b"[" * 990, b"1e999", b"\xff\xfe"])
        + raw[at + 1 :],
        raw[:-1] + b", " + raw[1:],  # each key twice
        b'{"user": ' + b"[" * (n := random.choice([100, 900, 990, 5000])) + b"]" * n + b", " + raw[1:],
        raw.decode(errors="replace").encode("utf-16"),
        b"\xef\xbb\xbf" + raw,
    ]
    return path, raw if random.random() < 0.6 else random.choice(damages)


@contextmanager
def in_process(tokenizer: Tokenizer, **limits: int) -> Iterator[httpx.AsyncClient]:
    """A client of a server in the same event loop.  It raises what the server does not catch."""
    service = Service([Served("first", FIRST, tokenizer, 1)], Limits(**limits))
    service.worker.start()
    try:
        yield httpx.AsyncClient(transport=httpx.ASGITransport(build_app(service, [])), base_url="http://localhost")
    finally:
        service.close()


def test_malformed_requests_have_an_error_in_openais_form(tiny_tokenizer):
    chance, found = random.Random(1), dict[int, int]()
    kinds = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"]

    async def ask() -> None:
        with in_process(tiny_tokenizer, max_tokens=8) as web:
            for _ in range(N_MALFORMED):
                path, raw = malformed(chance)
                headers = {"content-type": chance.choice(kinds)}
                began = time.monotonic()
                response = await web.post(path, content=raw, headers=headers)
                assert time.monotonic() - began < 20, raw
                found[response.status_code] = found.get(response.status_code, 0) + 1
                assert response.status_code == 200 or 400 <= response.status_code < 500, raw
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(ask())
    assert found[400] > N_MALFORMED / 2


HOST = b"host: localhost\r\n"
ASKED = b'{"prompt": "a", "max_tokens": 2}'


def framed(body: bytes, headers: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + headers
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n"


ODD: dict[str, tuple[bytes, list[int]]] = {
    "requests in a row": (framed(ASKED) * 3 + HEALTH, [200] * 4),
    "nonsense in a row": (framed(ASKED) + b"nonsense\r\n\r\n", [200, 400]),
    "more after the last": (framed(ASKED, b"connection: close\r\n") + b"nonsense" * 99, [200]),
    "a megabyte in a row": (framed(ASKED) + b"x" * 2**20, []),
    "a large head": (b"GET / HTTP/1.1\r\n" + HOST + b"x: " + b"a" * 10**6 + b"\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03", [400]),
    "a websocket": (HEALTH.replace(b"close", b"upgrade\r\nupgrade: websocket"), [200]),
    "two lengths": (framed(ASKED, b"content-length: 1\r\n"), [400]),
    "a chunk without a size": (HEALTH.replace(b"close", b"close\r\ntransfer-encoding: chunked") + b"zz\r\n", [400]),
    "HEAD": (HEALTH.replace(b"GET", b"HEAD"), [200]),
    "OPTIONS": (HEALTH.replace(b"GET /health", b"OPTIONS /v1/completions"), [405]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_quite_http_gets_an_error_and_ends(name, tiny_tokenizer, caplog):
    sent, statuses = ODD[name]
    with running(tiny_tokenizer, client_seconds=1) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            answer = b""
            try:
                connection.sendall(sent)
                while part := connection.recv(2**16):
                    answer += part
            except ConnectionError:
                pass
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == statuses
        if statuses == [405]:
            assert b"\r\nallow: POST\r\n" in answer
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert not [record for record in caplog.records if record.exc_info]


LARGE = {"prompt": [7] * 400, "n": 16, "echo": True, "logprobs": 5}


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_is_long_is_not_made_in_the_event_loop(is_stream, tiny_tokenizer):
    async def ask() -> float:
        with in_process(tiny_tokenizer) as web:
            began, loop_began = time.process_time(), time.thread_time()
            asked = LARGE | {"prompt": [7] * 1000, "n": 32, "max_tokens": 1, "stream": is_stream}
            assert (await web.post("/v1/completions", json=asked, timeout=60)).status_code == 200
            return (time.thread_time() - loop_began) / (time.process_time() - began)

    assert asyncio.run(ask()) < 0.35


def test_prompts_and_answers_are_bounded_together(tiny_tokenizer):
    with running(tiny_tokenizer, max_prompts=6400) as (address, _):
        ask = lambda **document: httpx.post(f"{address}/v1/completions", json=document, timeout=60)  # noqa: E731
        assert ask(**LARGE, max_tokens=0).status_code == 200
        refused = ask(**LARGE | {"n": 17}, max_tokens=0)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert (
            "prompt has 6,800 ids with all answers (17 each), at most 6,400 are allowed"
            in refused.json()["error"]["message"]
        )
        refused = ask(prompt=["a" * 1000] * 7)
        assert (
            "prompt has 7,000 bytes with all answers (1 each), at most 6,400 are allowed"
            in refused.json()["error"]["message"]
        )


def unread(address: str, document: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request, and does not read the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = address.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    connection.sendall(framed(json.dumps(document).encode()))
    return connection


def test_clients_that_never_read_leave_no_memory_in_use(tiny_tokenizer):
    """Rows, memory and descriptors are freed although the clients stay; and other clients are served meanwhile."""
    this = psutil.Process()
    streamed = LARGE | {"n": 8, "stream": True, "max_tokens": 2000, "ignore_eos": True}
    with running(tiny_tokenizer, client_seconds=1) as (address, service):
        httpx.post(f"{address}/v1/completions", json=LARGE, timeout=60)
        for _ in range(2):  # the first time also starts threads, which stay
            memory, n_open = this.memory_info().rss, this.num_fds()
            clients = [unread(address, streamed if i % 2 else LARGE) for i in range(12)]
            wait_until(lambda: service.worker.counts()["running"] > 0)
            delays = []
            while service.worker.counts() != {"running": 0, "waiting": 0}:
                began = time.monotonic()
                # on a new connection: the server closes one that has waited for a second
                assert httpx.get(f"{address}/health").status_code == 200
                delays.append(time.monotonic() - began)
                assert sum(delays) < 60
                time.sleep(0.01)
            assert statistics.median(delays) < 2  # seconds; the machine may be busy
            most = n_open + len(clients)  # the clients' ends are in this process, too
            wait_until(lambda most=most: this.num_fds() <= most)
            time.sleep(REST_SECONDS + 1)
            more = this.memory_info().rss - memory
            for client in clients:
                client.close()
        assert more < 8e6  # two thirds of a megabyte per client


def test_a_client_that_is_gone_is_noticed_though_it_sent_more(tiny_tokenizer):
    with running(tiny_tokenizer, max_tokens=100_000) as (address, service):
        document = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
        connection = unread(address, document)
        connection.sendall(framed(ASKED))  # the next request, which waits
        wait_until(lambda: service.worker.counts()["running"] == 1)
        connection.close()
        wait_until(lambda: service.worker.counts() == {"running": 0, "waiting": 0})


def test_a_long_answer_waits_in_pieces(tiny_tokenizer):
    """If a client does not read an answer of megabytes, about one piece is sent; a slow client gets all of it."""
    with running(tiny_tokenizer, client_seconds=20) as (address, _):
        document = LARGE | {"max_tokens": 0}
        whole = httpx.post(f"{address}/v1/completions", json=document, timeout=60).json()
        assert len(json.dumps(whole)) > 3 * PIECE
        with unread(address, document) as connection:
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += connection.recv(50_000)
                time.sleep(0.005)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert json.loads(unchunked(body))["choices"] == whole["choices"]


def unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)
