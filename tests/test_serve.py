"""The server: OpenAI's API as clients see it, batches, limits, and clients that leave."""

import concurrent.futures
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT, environment
from serving import FIRST, MODELS, running, wait_until
from test_gguf import byte_tokenizer

from tinygpt.errors import UserError
from tinygpt.generate import Sampling, generate
from tinygpt.generate.answer import Answer
from tinygpt.generate.decoder import Decoder
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.options import Limits
from tinygpt.serve import worker as serve_worker
from tinygpt.serve.choices import offsets, seen_before
from tinygpt.serve.request import Refusal, Served, read_request
from tinygpt.serve.server import is_known, listen, without_port
from tinygpt.serve.worker import Job, Worker

LONG = {"prompt": "the", "max_tokens": 100_000, "ignore_eos": True}
WEB = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=400))  # only one, as making a client takes 50 ms
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_k": 20, "top_p": 0.9, "frequency_penalty": 0.4, "presence_penalty": -0.2, "logit_bias": {"70": 2}},
    {"temperature": 1.5, "repetition_penalty": 1.3, "stop": ["e", "th"], "no_repeat_ngram_size": 2},
    {"min_p": 0.05, "stop_ids": list(range(1, 300, 30)), "stop": "a"},
]


@pytest.fixture(scope="module")
def served(tiny_tokenizer):
    with running(tiny_tokenizer, max_rows=16, max_waiting=100, max_prompt=4000, max_tokens=100_000) as (
        address,
        service,
    ):
        yield address, service


@pytest.fixture
def client(served):
    import openai  # here, as it takes a second

    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="any", max_retries=0) as client:
        yield client


def post(served, document: dict[str, Any], path: str = "/v1/completions", **options: Any) -> httpx.Response:
    return WEB.post(served[0] + path, json=document, **options)


def complete(served, **document: Any) -> dict[str, Any]:
    response = post(served, document)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(served, **document: Any) -> list[dict[str, Any]]:
    """The events of a stream except the last."""
    with WEB.stream("POST", f"{served[0]}/v1/completions", json=document | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def alone(tokenizer, prompt: str, n: int, model: str = "first", **options: Any) -> str:
    """The text without a server."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if isinstance(changes.get("stop"), str):
        changes["stop"] = (changes["stop"],)
    if "logit_bias" in changes:
        changes["logit_bias"] = tuple((int(i), bias) for i, bias in changes["logit_bias"].items())
    return generate(MODELS[model], tokenizer, prompt, max_new_tokens=n, sampling=Sampling(**changes))


def token_bytes(told: str) -> bytes:
    """The bytes of a token as the server sends it."""
    return bytes.fromhex(told[6:].replace("\\x", "")) if told.startswith("bytes:\\x") else told.encode()


def is_idle(served) -> bool:
    return served[1].worker.counts() == {"running": 0, "waiting": 0}


def test_the_models_are_listed_with_their_sizes(client):
    import openai

    assert [model.id for model in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").owned_by == "tinygpt"
    with pytest.raises(openai.NotFoundError, match="model third is not served here: choose one of first, second"):
        client.models.retrieve("third")


@pytest.mark.parametrize("model", MODELS)
def test_the_client_of_openai_gets_the_texts_that_generate_gives(model, client, tiny_tokenizer):
    found = client.completions.create(
        model=model,
        prompt=["the file", "über 😀"],
        max_tokens=20,
        n=2,
        seed=7,
        temperature=0.9,
        top_p=0.95,
        logit_bias={"70": 2},
        extra_body={"top_k": 50},
    )
    options = {"temperature": 0.9, "top_p": 0.95, "logit_bias": {"70": 2}, "top_k": 50, "model": model}
    expected = [
        alone(tiny_tokenizer, prompt, 20, seed=seed, **options) for prompt in ("the file", "über 😀") for seed in (7, 8)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert (found.object, found.model) == ("text_completion", model)
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(1 + len(tiny_tokenizer.encode(text)) for text in ("the file", "über 😀"))


def test_the_client_of_openai_streams(client, tiny_tokenizer):
    events = list(
        client.completions.create(
            model="first", prompt="the", max_tokens=30, seed=3, stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    texts = ["", ""]
    for event in events[:-1]:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [alone(tiny_tokenizer, "the", 30, seed=seed) for seed in (3, 4)]
    assert len(events) > 20
    assert events[-1].usage.total_tokens == events[-1].usage.prompt_tokens + events[-1].usage.completion_tokens
    assert events[-1].usage.completion_tokens <= 60


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_is_the_whole_in_parts(options, echo, served):
    asked = {"prompt": "a 中 file", "max_tokens": 25, "n": 3, "logprobs": 2, "echo": echo, "return_token_ids": True}
    whole = complete(served, **asked, **options, seed=11)["choices"]
    parts = [event["choices"][0] for event in streamed(served, **asked, **options, seed=11)]
    for choice in whole:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [i for part in mine for i in part["token_ids"]] == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            joined = [value for part in mine for value in part["logprobs"][name]]
            if name == "top_logprobs":
                for one, other in zip(joined, values, strict=True):
                    assert one == pytest.approx(other, abs=1e-4)
            else:
                assert joined == (pytest.approx(values, abs=1e-4) if name == "token_logprobs" else values)
        told = b"".join(map(token_bytes, choice["logprobs"]["tokens"])).decode(errors="replace")
        if "stop" in options:
            assert told.startswith(choice["text"])
        else:
            assert told == choice["text"]


def test_no_token_of_a_stop_text_is_sent(served, tiny_tokenizer):
    whole = complete(served, prompt="the", max_tokens=30, seed=1, ignore_eos=True, logprobs=0)["choices"][0]
    place = whole["logprobs"]["text_offset"][10] - 3  # where a token begins, not counting the prompt
    stop = whole["text"][place : place + 4]
    asked = {"prompt": "the", "max_tokens": 30, "seed": 1, "ignore_eos": True, "logprobs": 0, "stop": [stop]}
    end = whole["text"].index(stop)
    for parts in ([complete(served, **asked)], streamed(served, **asked)):
        choices = [part["choices"][0] for part in parts]
        assert "".join(choice["text"] for choice in choices) == whole["text"][:end]
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert offsets == [offset for offset in whole["logprobs"]["text_offset"] if offset < end + 3]
        assert choices[-1]["finish_reason"] == "stop"


def test_a_seed_gives_the_same_text_whatever_runs_next_to_it(served, tiny_tokenizer):
    asked = [
        {"prompt": prompt, "model": model, "max_tokens": 15 + 5 * seed, "seed": seed} | options
        for seed in range(2)
        for model in MODELS
        for prompt in ("", "the file", "über 中文 😀 and more than the context holds, " * 3)
        for options in SAMPLINGS
    ]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda each: complete(served, **each)["choices"][0]["text"], asked))
    for text, each in zip(found, asked, strict=True):
        options = {name: value for name, value in each.items() if name not in ("prompt", "max_tokens")}
        assert text == alone(tiny_tokenizer, each["prompt"], each["max_tokens"], **options)


def test_without_a_seed_texts_differ(served):
    assert len({complete(served, prompt="the", max_tokens=20)["choices"][0]["text"] for _ in range(4)}) > 1


def test_ids_are_taken_as_they_are_and_a_missing_prompt_begins_a_document(served, tiny_tokenizer):
    ids = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode("the file")]
    options = {"max_tokens": 12, "seed": 2}
    text = complete(served, prompt="the file", **options)["choices"][0]["text"]
    assert complete(served, prompt=ids, **options)["choices"][0]["text"] == text
    found = complete(served, prompt=[ids, [5, 6]], **options)
    assert found["choices"][0]["text"] == text
    assert found["usage"]["prompt_tokens"] == len(ids) + 2
    assert complete(served, **options)["choices"][0]["text"] == alone(tiny_tokenizer, "", 12, seed=2)


def test_log_probabilities_are_those_of_the_model(served, tiny_tokenizer):
    found = complete(
        served, prompt="the 中", max_tokens=10, seed=1, logprobs=3, echo=True, return_token_ids=True, temperature=0.5
    )["choices"][0]
    ids = found["prompt_token_ids"] + found["token_ids"]
    with torch.inference_mode():
        logprobs = FIRST(torch.tensor([ids]))[0].double().log_softmax(-1)
    told = found["logprobs"]
    assert len(told["tokens"]) == len(ids) - 1
    for i, (token, logprob, best) in enumerate(
        zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    ):
        assert logprob == pytest.approx(float(logprobs[i, ids[i + 1]]), abs=1e-4)
        assert best[token] == pytest.approx(logprob)
        expected = logprobs[i].topk(3).values.tolist()
        assert sorted(best.values(), reverse=True)[: len(best) - 1] == pytest.approx(
            expected[: len(best) - 1], abs=1e-4
        )
        assert 2 <= len(best) <= 4
    raw = b"".join(tiny_tokenizer.decode_bytes([i]) for i in ids[1:])
    assert found["text"] == raw.decode(errors="replace")
    assert [token for token in told["tokens"] if token.startswith("bytes:\\x")]  # parts of a character


def test_a_length_that_is_not_given_is_at_most_the_servers(tiny_tokenizer):
    models = {"first": Served("first", FIRST, tiny_tokenizer, 1)}
    for most, expected in ((8, 8), (100, 16)):
        asked = read_request(b'{"prompt": "a"}', models, Limits(max_tokens=most), is_chat=False)
        assert asked.body.max_tokens == asked.answers[0].max_new_tokens == expected


def test_a_token_after_a_broken_character_comes_after_its_sign():
    tokenizer = byte_tokenizer()
    ids = {tokenizer.decode_bytes([i]): i for i in range(257)}
    text = [ids[bytes([byte])] for byte in b"a\xc3\xa4\xe4E"]
    assert (tokenizer.decode(text), list(offsets(tokenizer, text))) == ("aä\ufffdE", [0, 1, 1, 2, 3])


def test_a_prompt_alone_is_scored_as_far_as_the_context_reaches(served, tiny_tokenizer):
    ids = [(7 * i) % 300 for i in range(50)]
    found = complete(served, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    choice, told = found["choices"][0], found["choices"][0]["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (tiny_tokenizer.decode(ids), "length")
    assert found["usage"] == {"prompt_tokens": 50, "completion_tokens": 0, "total_tokens": 50}
    with torch.inference_mode():
        logprobs = FIRST(torch.tensor([ids[-32:]]))[0].double().log_softmax(-1)
    assert told["token_logprobs"][:19] == told["top_logprobs"][:19] == [None] * 19
    expected = [float(logprobs[i, ids[19 + i]]) for i in range(31)]
    assert told["token_logprobs"][19:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("document", "status", "message"),
    [
        ({"promt": "a"}, 400, r"unknown key promt \(did you mean prompt\?\)"),
        ({"temperature": -1}, 400, r"temperature=-1 must be 0 or more"),
        ({"top_p": 2}, 400, r"top_p=2 must be from 0 to 1"),
        ({"top_p": "0.5"}, 400, 'top_p="0.5" must be a finite number'),
        ({"n_beam": 0}, 400, "unknown key n_beam"),
        ({"n": 0}, 400, r"n=0 must be from 1 to 1024"),
        ({"n": 17}, 400, "prompt and n ask for 17 answers, at most 16 are allowed per request"),
        ({"prompt": ["a"] * 5, "n": 4}, 400, "ask for 20 answers"),
        ({"prompt": ["a"] * 17}, 400, "prompt and n ask for 17 answers, at most 16 are allowed per request"),
        ({"max_tokens": 0}, 400, "max_tokens=0 needs echo"),
        ({"max_new_tokens": 5}, 400, r"^unknown key max_new_tokens \(did you mean max_tokens\?\)$"),
        ({"max_tokens": -1}, 400, "max_tokens=-1 must be"),
        ({"max_tokens": 100_001}, 400, "max_tokens=100001 must be at most 100000"),
        ({"max_tokens": 5, "min_new_tokens": 9}, 400, "min_new_tokens=9 is more than max_tokens=5"),
        ({"logprobs": 99}, 400, r"logprobs=99 must be from 0 to 20"),
        ({"max_tokens": 0, "echo": True, "stream": True}, 400, "max_tokens=0 has nothing to stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
        ({"stop": [""]}, 400, 'stop="" would end every'),
        ({"stop": ["a"] * 17}, 400, "stop has more than 16 items"),
        ({"stop": ["b", "a" * 257]}, 400, "stop has a text of more than 256 characters"),
        ({"banned_ids": [1] * 2000}, 400, "banned_ids has more than 1024 items"),
        ({"no_repeat_ngram_size": 17}, 400, r"no_repeat_ngram_size=17 must be from 0 to 16"),
        ({"stop_ids": [300]}, 400, "stop_ids has 300, but the model's ids are 0 to 299"),
        ({"logit_bias": {"x": 1}}, 400, "must be a whole number"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias has 999"),
        ({"logit_bias": {"9": 101}}, 400, "logit_bias must be"),
        ({"frequency_penalty": 1e300}, 400, r"must be from -2 to 2"),
        ({"repetition_penalty": 1e-300}, 400, r"must be from 0.01 to 100"),
        ({"seed": 2**64}, 400, r"seed=18446744073709551616 must be "),
        ({"model": "third"}, 404, "model third is not served here"),
        ({"prompt": 5}, 400, "prompt must be a text"),
        ({"prompt": []}, 400, "prompt must be a text"),
        ({"prompt": [[]]}, 400, "prompt must be a text"),
        ({"prompt": 5, "top_k": -1}, 400, "prompt must be a text, .+; top_k=-1 must be 0 or more"),
        ({"prompt": "a", "best_of": 3, "suffix": "b"}, 400, 'best_of can only be 1; suffix can only be ""'),
        ({"prompt": [True]}, 400, "prompt must be a text"),
        ({"prompt": [["a"]]}, 400, "prompt must be a text"),
        ({"prompt": [300]}, 400, "prompt has the id 300, but the model's ids are 0 to 299"),
        ({"prompt": [-1]}, 400, "prompt has the id -1"),
        ({"prompt": "a" * 5000}, 400, "prompt has 5,000 bytes, at most 4,000 are allowed"),
        ({"prompt": "no \udcff text"}, 400, "prompt is not UTF-8 from character 3 on"),
        ({"prompt": "a", "when_full": "slid"}, 400, r"did you mean slide\?"),
        ({"prompt": "the file " * 50, "when_full": "stop"}, 400, "leaves no room in a context of 32"),
        ({"stop": "\ud800", "top_k": -1}, 400, "top_k=-1 must be"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_with_what_is_wrong(document, status, message, served):
    response = WEB.post(f"{served[0]}/v1/completions", content=json.dumps(document))
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff in position 12"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"top_p": NaN}', "top_p=nan must be a finite number"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"n": ' + b"9" * 400 + b"}", "n=999"),
        (b"[]", "must be a JSON object"),
    ],
    ids=["empty", "torn", "latin-1", "deep", "nan", "huge", "large", "list"],
)
def test_what_is_not_a_request_is_refused(raw, message, served):
    for path in ("/v1/completions", "/look"):
        response = WEB.post(served[0] + path, content=raw)
        assert response.status_code == 400
        if path == "/v1/completions" or "=" not in message:
            assert message in response.json()["error"]["message"]


def test_unknown_routes_and_methods_have_errors_in_the_same_form(served):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/../a", 404)):
        response = WEB.request(method, served[0] + path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_request_of_ten_megabytes_is_refused_before_it_is_read(served):
    host, port = served[0].removeprefix("http://").split(":")
    for head, body in (
        (b"content-length: 10000000", b""),
        (b"transfer-encoding: chunked", b"10000\r\n" + b"a" * 0x10000 + b"\r\n"),
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
            for _ in range(5 if body else 0):  # a little more than the limit, without an end
                connection.sendall(body)
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    response = WEB.post(f"{served[0]}/v1/completions", content=b"a" * 10_000_000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    complete(served, prompt="the", max_tokens=2)


@pytest.mark.parametrize("length", [b"abc", b"-1", b"9" * 30])
def test_a_length_that_is_not_a_number_is_refused(length, served):
    host, port = served[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: " + length + b"\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_two_hundred_clients_at_once_are_served_or_asked_to_come_back(served, tiny_tokenizer):
    expected = {seed: alone(tiny_tokenizer, "the", 6, seed=seed) for seed in range(200)}
    begin = threading.Barrier(200)

    def ask(seed: int) -> int:
        begin.wait()
        if seed % 2:
            response = post(served, {"prompt": "the", "max_tokens": 6, "seed": seed})
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else None
        else:
            document = {"prompt": "the", "max_tokens": 6, "seed": seed, "stream": True}
            response = post(served, document)
            events = [line[6:] for line in response.text.splitlines() if line and line != "data: [DONE]"]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events) if events[0][0] == "{" else None
        if response.status_code == 200:
            assert text == expected[seed]
        else:
            assert response.status_code == 429, response.text
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
        return response.status_code

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, range(200)))
    assert found.count(200) >= 100  # as many as are allowed to wait
    wait_until(lambda: is_idle(served))


def test_a_client_that_goes_away_frees_its_rows(served):
    with WEB.stream("POST", f"{served[0]}/v1/completions", json=LONG | {"stream": True, "n": 3}) as response:
        lines = response.iter_lines()
        next(lines)
        assert served[1].worker.counts()["running"] == 3
    wait_until(lambda: is_idle(served))
    with pytest.raises(httpx.ReadTimeout):
        WEB.post(f"{served[0]}/v1/completions", json=LONG | {"n": 2}, timeout=httpx.Timeout(60, read=0.5))
    wait_until(lambda: is_idle(served))


def test_too_many_requests_and_slow_ones_are_refused(tiny_tokenizer):
    with running(tiny_tokenizer, max_rows=1, max_waiting=1, client_seconds=1, max_tokens=100_000) as served:
        document = LONG | {"stream": True}
        with (
            WEB.stream("POST", f"{served[0]}/v1/completions", json=document) as first,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            lines = first.iter_lines()
            next(lines)
            second = pool.submit(post, served, {"prompt": "a", "max_tokens": 1})
            wait_until(lambda: served[1].worker.counts()["waiting"] == 1)
            third = post(served, {"prompt": "a", "max_tokens": 1})
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert not second.done()
            first.close()
            assert second.result().status_code == 200
        host, port = served[0].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    with pytest.raises(httpx.ConnectError):
        WEB.get(served[0])


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT"])
def test_a_connection_without_a_whole_head_is_closed(sent, tiny_tokenizer):
    with running(tiny_tokenizer, client_seconds=1) as served:
        host, port = served[0].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            answer = b"".join(iter(lambda: connection.recv(1000), b""))  # until it is closed
        assert answer.startswith(b"HTTP/1.1 200 " if b"\r\n\r\n" in sent else b"")
        assert WEB.get(f"{served[0]}/health").status_code == 200


def test_an_answer_may_take_longer_than_a_client(tiny_tokenizer):
    with (
        running(tiny_tokenizer, client_seconds=1, max_tokens=100_000) as served,
        WEB.stream("POST", f"{served[0]}/v1/completions", json=LONG | {"stream": True}) as response,
    ):
        lines, ends = response.iter_lines(), time.monotonic() + 2.5
        while time.monotonic() < ends:
            next(lines)


def test_a_connection_is_kept_for_longer_than_openais_client_keeps_it(served):
    connection = http.client.HTTPConnection(served[0].removeprefix("http://"), timeout=20)
    for pause in (5.5, 0):  # httpx keeps them for 5 s, and so does the openai client
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["status"] == "ok"
        time.sleep(pause)
    connection.close()


def test_more_requests_than_may_run_get_status_503(tiny_tokenizer):
    with running(tiny_tokenizer, max_rows=1, max_waiting=1, max_tokens=100_000) as served:
        host, port = served[0].removeprefix("http://").split(":")
        document = LONG | {"stream": True}
        with ExitStack() as stack:
            for name in ("running", "waiting"):
                stream = WEB.stream("POST", f"{served[0]}/v1/completions", json=document)
                assert stack.enter_context(stream).status_code == 200
                wait_until(lambda name=name: served[1].worker.counts()[name] == 1)
            for _ in range(2):
                connection = stack.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(b"POST /look HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n")
            wait_until(lambda: WEB.get(f"{served[0]}/health").status_code == 503)
            fifth = WEB.get(f"{served[0]}/health")
            assert fifth.json()["error"]["type"] == "server_error"
            assert (fifth.headers["retry-after"], fifth.headers["connection"]) == ("1", "close")
        wait_until(lambda: WEB.get(f"{served[0]}/health").status_code == 200)


def test_the_advice_for_an_unknown_name_helps(tiny_tokenizer):
    headers = {"host": "a.example:8000"}
    with running(tiny_tokenizer) as served:
        told = WEB.get(f"{served[0]}/health", headers=headers).json()["error"]["message"]
    assert told == "this server does not answer to the name a.example: add --allow-host a.example"
    for name in ("a.example", "A.example:8000"):
        assert is_known("a.example:8000", {without_port(name)})


def test_requests_that_need_not_wait_do_not_count_as_waiting(tiny_tokenizer):
    worker = Worker({"first": FIRST}, dataclasses.replace(Limits(), max_rows=4, max_waiting=1))  # it is not started
    answers = [Answer("a", tiny_tokenizer, Sampling(), max_new_tokens=1, block_size=32) for _ in range(5)]
    for answer in answers[:4]:
        worker.submit(Job("first", [answer], print))
    with pytest.raises(Refusal, match="4 requests are already waiting"):
        worker.submit(Job("first", answers[4:], print))


def test_what_cannot_be_the_name_of_a_machine_is_one_line():
    with pytest.raises(UserError, match="cannot listen on a..b, port 0 .no name of a machine.: choose another --port"):
        listen("a..b", 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "known.example"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(headers, status, served):
    response = post(served, {"prompt": "a", "max_tokens": 1}, headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_the_page_has_all_it_needs_and_loads_nothing_from_elsewhere(served):
    page = WEB.get(served[0])
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert named
    for path in named:
        found = WEB.get(f"{served[0]}/{path.removeprefix('/')}")
        assert found.status_code == 200
        assert not re.search(
            r"(?:src|href|import|from|url|fetch)\W*https?:|innerHTML|insertAdjacentHTML|document.write|eval", found.text
        )
    assert "<script>" not in page.text and "style=" not in page.text


def test_the_attention_that_the_page_shows_is_that_of_the_decoder(served, tiny_tokenizer):
    found = complete(
        served, prompt="the file", max_tokens=60, seed=1, ignore_eos=True, return_token_ids=True, logprobs=5
    )
    choice = found["choices"][0]
    for n in (0, 3, 40, 59):  # the context of 32 fills up on the way
        told = post(
            served, {"prompt": choice["prompt_token_ids"], "text": choice["token_ids"][:n], "taken": 7}, "/look"
        ).json()
        assert 7 in [one["id"] for one in told["alternatives"]]
        best = choice["logprobs"]["top_logprobs"][n]
        for one in told["alternatives"][:3]:
            assert one["p"] == pytest.approx(2.718281828 ** best[one["token"]], abs=1e-3)
        attention = torch.tensor(told["attention"])
        assert attention.shape == (2, 4, len(told["tokens"]))
        assert attention.sum(-1).tolist() == [[pytest.approx(1, abs=0.01)] * 4] * 2
    assert len(told["tokens"]) <= 32
    valid = {"prompt": [1], "text": [2], "taken": 3}
    assert post(served, valid, "/look").status_code == 200
    for change in (
        {"prompt": []},
        {"prompt": [True]},
        {"prompt": [999]},
        {"prompt": None},
        {"text": "a"},
        {"text": [999]},
        {"taken": "a"},
        {"taken": 999},
    ):
        assert post(served, valid | change, "/look").status_code == 400


@settings(max_examples=12)
@given(prompt=st.lists(st.integers(0, 299), min_size=1, max_size=40), text=st.lists(st.integers(0, 299), max_size=60))
def test_the_page_shows_what_the_decoder_has_read(prompt, text):
    decoder = Decoder(FIRST, [prompt])
    for i in text:
        decoder.step([i])
    with torch.inference_mode():
        expected = FIRST(torch.tensor([seen_before(prompt, text, 32)]))[0, -1]
    torch.testing.assert_close(decoder.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_fails_ends_its_answers_and_not_the_server(served, tiny_tokenizer):
    broken = tiny_model()
    with torch.no_grad():
        broken.tok_emb.weight[0] = torch.nan  # `<|endoftext|>`, with which each document begins
    told: list[Any] = []
    worker = Worker({"broken": broken, "first": FIRST}, Limits())
    worker.start()
    try:
        begin = lambda: serve_worker.Answer([0], tiny_tokenizer, Sampling(), max_new_tokens=3, block_size=64)  # noqa: E731
        worker.submit(Job("broken", [begin()], told.append))
        wait_until(lambda: len(told) == 1)
        assert (told[0].status, told[0].code) == (500, "model_failed")
        assert "the logits are not finite numbers" in told[0].message
        worker.submit(Job("first", [begin()], told.append))
        wait_until(lambda: told[-1] != told[0] and bool(told[-1][0].finish_reason))
        assert worker.counts() == {"running": 0, "waiting": 0}
    finally:
        worker.stop()
        worker.join()
    worker_is_over = pytest.raises(Exception, match="the server is stopping")
    with worker_is_over:
        worker.submit(Job("first", [begin()], told.append))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """data/model and data/tokenizer, and another folder with both."""
    folder = tmp_path_factory.mktemp("serve")
    model = tiny_model(n_layer=1, n_embd=128)  # slow enough to be stopped, and quickly compiled
    for name in ("data/model", "other"):
        save_model(folder / name, model.config, model_tensors(model))
    tiny_tokenizer.save(folder / "data/tokenizer")
    tiny_tokenizer.save(folder / "other")
    return folder


def serve_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "tinygpt", "serve", "--port", "0", *args]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_streams(number, folder):
    models = ["--model", "data/model", "--model", "b=other", "--max-tokens", "100000", "--quantize", "int8"]
    process = subprocess.Popen(
        serve_command(*models, *(["--compile", "--max-rows", "1"] if number == signal.SIGINT else [])),
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("data/model, b at http://127.0.0.1:")
        listed = WEB.get(line.split()[-1] + "/v1/models").json()["data"]
        assert [model["n_weight"] for model in listed] == [tiny_model(n_layer=1, n_embd=128).n_params()] * 2
        with WEB.stream("POST", line.split()[-1] + "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert errors in ("stopped\n", "interrupted\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "{taken}"], "error: cannot listen on 127.0.0.1, port {taken} (Address already in use): choose"),
        (["--port", "70000"], "error: --port=70000 must be from 0 to 65535"),
        (["--host", "203.0.113.7"], "error: cannot listen on 203.0.113.7, port 0"),
        (["--model", "a", "--model", "a"], "error: --model a: its name is taken"),
        (["--model", "nothing"], "error: nothing not found: give a folder with config.json"),
        (["--model", "a=b.gguf"], "error: --model b.gguf: serve does not read .gguf files"),
        (["--max-rows", "0"], "error: --max-rows=0 must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_reported_in_one_line(args, message, folder, monkeypatch, capsys):
    from tinygpt.cli.main import main

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        monkeypatch.chdir(folder)
        monkeypatch.setattr(
            sys, "argv", ["tinygpt", "serve", "--port", "0", *(each.format(taken=taken) for each in args)]
        )
        with pytest.raises(SystemExit) as ended:
            main()
    assert str(ended.value).startswith(message.format(taken=taken))
    assert "\n" not in str(ended.value)


def test_missing_packages_are_named(monkeypatch):
    from tinygpt.cli.main import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tinygpt.serve.server")  # which imports it
    monkeypatch.setattr(sys, "argv", ["tinygpt", "serve"])
    with pytest.raises(SystemExit, match="serve needs uvicorn: pip install -r requirements-serve.txt"):
        main()
