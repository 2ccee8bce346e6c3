"""A server that gets HTTP wrong in about 50 ways: each ends with the right file or one line of error, within seconds.

A good answer afterwards always gives the right file: nothing bad is kept.
"""

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import random
import re
import socket
import socketserver
import struct
import tarfile
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard
from test_sources import fill, texts

from tinygpt.corpus import fetch
from tinygpt.errors import UserError

TEXT = "".join(f"Line {i} of a text that is right: {i * i % 997}.\n" for i in range(9000))  # 400 kB
OLD = TEXT.replace("right", "older")
Behaviour = Callable[["Asked"], Iterable[bytes]]


def pack(name: str, text: str) -> bytes:
    """A file with the text in it, packed as its name says."""
    content, file = text.encode(), io.BytesIO()
    if name.endswith("tar.gz"):
        with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
            member = tarfile.TarInfo("a.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return file.getvalue()
    if name.endswith("zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", content)
        return file.getvalue()
    return gzip.compress(content, 1, mtime=0) if name.endswith("gz") else content


NAMES = ("text.txt", "text.txt.gz", "text.zip", "text.tar.gz")
FILES = {name: pack(name, TEXT) for name in NAMES}
OLDER = {name: pack(name, OLD) for name in NAMES}


class Asked:
    """One request: the file, how often it has been requested, and from which byte on."""

    def __init__(self, name: str, time: int, range: str | None, validator: str | None, connection: socket.socket):
        self.name, self.file, self.old, self.time = name, FILES[name], OLDER[name], time
        self.begin = int(re.findall("[0-9]+", range)[0]) if range else None
        self.validator, self.connection = validator, connection


class Handler(socketserver.StreamRequestHandler):
    """Reads a request for /<behaviour>/<file> and answers with this behaviour."""

    def handle(self) -> None:
        lines = [line.decode("latin-1").strip() for line in iter(self.rfile.readline, b"\r\n") if line]
        if not lines:
            return
        headers = dict(line.split(": ", 1) for line in lines[1:])
        kind, name = lines[0].split()[1].partition("?")[0].strip("/").split("/")[:2]
        self.server.times[kind, name] += 1
        asked = Asked(
            name, self.server.times[kind, name], headers.get("Range"), headers.get("If-Range"), self.connection
        )
        behaviour = right if self.server.is_good else KINDS[kind][0]
        try:
            for piece in behaviour(asked):
                self.wfile.write(piece)
        except OSError:  # the client has gone
            pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.times: Counter[tuple[str, str]] = Counter()
        self.is_good = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.delenv("TINYGPT_MIRROR", raising=False)
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)
    monkeypatch.setattr(fetch, "MOST_UNTOLD", 2_000_000)
    server.is_good = False


# What servers do


def head(status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode("latin-1")


def body(
    file: bytes, *headers: str, status: str = "200 OK", length: int | None = None, etag: str = "new"
) -> list[bytes]:
    return [head(status, f'ETag: "{etag}"', f"Content-Length: {length or len(file)}", *headers), file]


def part(asked: Asked, file: bytes, *headers: str, content_range: str = "", etag: str | None = "new") -> list[bytes]:
    begin = asked.begin or 0
    content_range = content_range or f"bytes {begin}-{len(file) - 1}/{len(file)}"
    tag = [f'ETag: "{etag}"'] if etag else []
    rest = file[begin:]
    told = [f"Content-Range: {content_range}", f"Content-Length: {len(rest)}", *tag, *headers]
    return [head("206 Partial Content", *told), rest]


def right(asked: Asked) -> list[bytes]:
    has_range = asked.begin is not None and asked.validator == '"new"' and asked.begin < len(asked.file)
    return part(asked, asked.file) if has_range else body(asked.file)


def cut(asked: Asked, *, etag: str = "new") -> list[bytes]:
    file = asked.old if etag == "old" else asked.file
    return body(file[: len(file) // 2], length=len(file), etag=etag)


def first(*behaviours: Behaviour) -> Behaviour:
    """Each behaviour once, then the right one."""
    return lambda asked: ([*behaviours, right][min(asked.time - 1, len(behaviours))])(asked)


def always(*pieces: bytes) -> Behaviour:
    return lambda asked: pieces


def redirect(to: str, *, status: str = "302 Found") -> Behaviour:
    return first(lambda asked: [head(status, f"Location: {to}".replace("NAME", asked.name), "Content-Length: 0")])


def redirect_for_ever(asked: Asked) -> list[bytes]:
    return [head("302 Found", f"Location: {asked.name}?{asked.time}", "Content-Length: 0")]


def redirect_with_endless_body(asked: Asked) -> Iterable[bytes]:
    if asked.time > 1:
        return right(asked)
    return itertools.chain([head("302 Found", f"Location: {asked.name}?again")], itertools.repeat(bytes(65_536)))


def silence(asked: Asked) -> Iterator[bytes]:
    time.sleep(0.5)
    yield b""


def reset(asked: Asked) -> Iterator[bytes]:
    yield from cut(asked)
    asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def chunks(
    file: bytes, *, last: bytes = b"0\r\n\r\n", size: int = 50_000, headers: tuple[str, ...] = ()
) -> list[bytes]:
    parts = (file[i : i + size] for i in range(0, len(file), size))
    return [
        head("200 OK", "Transfer-Encoding: chunked", *headers),
        *(b"%x\r\n%b\r\n" % (len(p), p) for p in parts),
        last,
    ]


def packed(file: bytes, share: float = 1.0, name: str = "gzip") -> list[bytes]:
    stream = gzip.compress(file, 1)
    return body(stream[: int(len(stream) * share)], f"Content-Encoding: {name}")


PAGE = b"<!DOCTYPE html><html><body><form>Log in</form></body></html>"
RIGHT = ""
GZ = {"text.txt.gz": RIGHT, "text.tar.gz": RIGHT}

# What the server does, and the expected result: the right text, or one line with these words.  A dict has it by file.
KINDS: dict[str, tuple[Behaviour, str | dict[str, str]]] = {
    "right": (right, RIGHT),
    "weak_etag": (lambda a: [head("200 OK", 'ETag: W/"x"', f"Content-Length: {len(a.file)}"), a.file], RIGHT),
    "no_length": (lambda a: [head(), a.file], RIGHT),
    "http_1_0": (lambda a: [b"HTTP/1.0 200 OK\r\n\r\n", a.file], RIGHT),
    "chunked": (lambda a: chunks(a.file), RIGHT),
    "chunked_in_bytes": (lambda a: chunks(a.file, size=97), RIGHT),
    "chunked_with_a_wrong_length": (lambda a: chunks(a.file, headers=("Content-Length: 7",)), RIGHT),
    "chunked_and_cut": (lambda a: chunks(a.file, last=b""), "cannot download"),
    "chunked_and_cut_once": (first(lambda a: chunks(a.file[:99_000], last=b"")), RIGHT),
    "chunks_of_no_size": (lambda a: chunks(a.file, last=b"zz\r\n"), "cannot download"),
    "chunks_of_a_negative_size": (lambda a: chunks(a.file, last=b"-5\r\nabc"), "cannot download"),
    "a_part_unasked": (lambda a: part(a, a.file), "answered 206"),
    "not_modified_unasked": (always(head("304 Not Modified")), "answered 304"),
    "no_content": (always(head("204 No Content")), "answered 204"),
    "no_such_range_unasked": (always(head("416 Nope", "Content-Length: 0")), "answered 416"),
    "missing": (always(head("404 Not Found", "Content-Length: 0")), "answered 404"),
    "forbidden": (always(*body(PAGE, status="403 Forbidden")), "answered 403"),
    "status_999": (always(head("999 What")), "answered 999"),
    "busy_then_right": (first(*[always(head(f"{n} X")) for n in (500, 503, 429)]), RIGHT),
    "always_busy": (always(head("503 Busy")), "answered 503"),
    "cut_then_right": (first(cut), RIGHT),
    "reset_then_right": (first(reset), RIGHT),
    "always_cut": (lambda a: body(a.file[:1000], length=len(a.file), etag=str(a.time)), "cannot download"),
    "cut_then_the_rest_of_another": (first(lambda a: cut(a, etag="old"), lambda a: part(a, a.file)), RIGHT),
    "cut_then_a_rest_without_etag": (first(cut, lambda a: part(a, a.old, etag=None)), RIGHT),
    "cut_then_another_begin": (first(cut, lambda a: part(a, a.file, content_range="bytes 7-8/9")), RIGHT),
    "cut_then_another_size": (first(cut, lambda a: part(a, a.file, content_range=f"bytes {a.begin}-8/9")), RIGHT),
    "cut_then_no_content_range": (first(cut, lambda a: body(a.file[a.begin :], status="206 P")), RIGHT),
    "cut_then_an_odd_range": (first(cut, lambda a: part(a, a.file, content_range="lines one-two/many")), RIGHT),
    "cut_then_a_packed_rest": (first(cut, lambda a: part(a, a.file, "Content-Encoding: gzip")), RIGHT),
    "cut_then_a_shorter_rest": (first(cut, lambda a: [part(a, a.file)[0], a.file[a.begin : a.begin + 5]]), RIGHT),
    "cut_then_no_such_range": (first(cut, always(*body(PAGE, "Content-Type: text/html", status="416 No"))), RIGHT),
    "cut_then_the_whole": (first(cut, lambda a: body(a.file)), RIGHT),
    "cut_then_a_new_version": (first(lambda a: cut(a, etag="old")), RIGHT),
    "cut_then_a_page": (first(cut, always(*body(PAGE, "Content-Type: text/html"))), "web page"),
    "cut_then_not_modified": (first(cut, always(head("304 Not Modified"))), "answered 304"),
    "packed_unasked": (lambda a: packed(a.file), RIGHT),
    "packed_by_an_old_name": (lambda a: packed(a.file, name="X-GZIP"), RIGHT),
    "packed_and_cut": (lambda a: packed(a.file, share=0.5), "damaged or cut off"),
    "packed_and_cut_once": (first(lambda a: packed(a.file, share=0.5)), RIGHT),
    "its_own_packing_named": (
        lambda a: body(a.file, "Content-Encoding: gzip"),
        {**dict.fromkeys(NAMES, "damaged or cut off"), **GZ},
    ),
    "packed_in_an_unknown_way": (lambda a: body(a.file, "Content-Encoding: br"), "something other than gzip"),
    "empty": (always(*body(b"")), "empty file"),
    "empty_without_length": (always(head()), "empty file"),
    "empty_chunked": (lambda a: chunks(b""), "empty file"),
    "empty_packed": (lambda a: packed(b""), "empty file|holds no text"),
    "a_page": (always(*body(PAGE, "Content-Type: text/html; charset=utf-8")), "web page"),
    "a_page_without_its_kind": (
        always(*body(PAGE)),
        {"text.txt.gz": "damaged or cut off", "text.zip": "damaged or cut off"},  # nobody could notice in a .txt
    ),
    "noise": (always(*body(bytes(range(256)) * 99)), "no text|damaged or cut off"),
    "redirect_within": (redirect("/redirect_within/NAME?x"), RIGHT),
    "redirect_relative": (redirect("../redirect_relative/NAME", status="307 T"), RIGHT),
    "redirect_non_ascii": (redirect("/redirect_non_ascii/NAME?\xc3\xa9"), RIGHT),
    "redirect_not_utf8": (redirect("/redirect_not_utf8/NAME?\xe9"), "cannot download"),
    "redirect_loop": (redirect_for_ever, "redirects"),
    "redirect_to_a_file": (redirect("file:///etc/passwd"), "cannot download"),
    "redirect_to_ftp": (redirect("ftp://127.0.0.1/x"), "cannot download"),
    "redirect_to_nothing": (redirect(""), "answered 302|redirects|cannot download"),
    "redirect_to_half_an_address": (redirect("http://[::1/x"), "cannot download"),
    "redirect_to_no_port": (redirect("http://127.0.0.1:99999/x"), "cannot download"),
    "redirect_to_a_long_label": (redirect(f"http://{'x' * 70}.invalid/x"), "cannot download"),
    "redirect_to_an_escape": (redirect("ftp://x/\x1b]0;title\x07"), "cannot download"),
    "redirect_with_an_endless_body": (redirect_with_endless_body, RIGHT),
    "length_not_a_number": (lambda a: [head("200 OK", "Content-Length: many"), a.file], RIGHT),
    "length_negative": (lambda a: [head("200 OK", "Content-Length: -5"), a.file], RIGHT),
    "length_superscript": (lambda a: [head("200 OK", "Content-Length: \xb2"), a.file], RIGHT),
    "length_twice": (lambda a: body(a.file, "Content-Length: 3"), "cannot download"),
    "length_astronomic": (lambda a: body(a.file, length=10**25), "make room"),
    "length_of_5000_digits": (lambda a: body(a.file, length=10**4999), "cannot download"),
    "silent": (silence, "cannot download"),
    "silent_after_the_head": (lambda a: itertools.chain(body(b"", length=9), silence(a)), "cannot download"),
    "closes_at_once": (always(), "cannot download"),
    "not_http": (lambda a: [a.file], "cannot download"),
    "half_a_head": (always(b"HTTP/1.1 200 OK\r\nContent-Le"), "cannot download|empty file"),
    "head_without_colons": (lambda a: [b"HTTP/1.1 200 OK\r\nnothing here\r\n\r\n", a.file], "|cannot download"),
    "a_header_of_megabytes": (lambda a: body(a.file, "X: " + "x" * 3_000_000), "cannot download"),
    "many_headers": (lambda a: body(a.file, *(f"X-{i}: x" for i in range(50_000))), "cannot download"),
    "a_reason_with_an_escape": (always(head("404 \x1b]0;title\x07")), "answered 404"),
    "never_ends": (lambda a: itertools.chain([head()], itertools.repeat(bytes(65_536))), "more than 2.0 MB"),
}  # fmt: skip


def cache(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("cache/*")}


SLOW = {kind for kind in KINDS if "silent" in kind}  # these take seconds
ROWS = [
    (kind, name, words if isinstance(words, str) else words[name])
    for kind, (_, words) in KINDS.items()
    for name in (NAMES[:1] if kind in SLOW else NAMES[:3])
    if isinstance(words, str) or name in words
]


@pytest.mark.parametrize(("kind", "name", "words"), ROWS)
def test_the_right_file_or_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, words: str
) -> None:
    if kind in SLOW:
        monkeypatch.setattr(fetch, "TIMEOUT_S", (1.0, 0.2))
    begun, url = time.monotonic(), f"{server.url}/{kind}/{name}"
    try:
        fill(tmp_path, url)
    except UserError as error:
        assert words and re.search(words, str(error)), str(error)
        assert str(error).isprintable()
        assert not [name for name in cache(tmp_path) if not name.endswith((".partial", ".partial.json"))]
        server.is_good = True
        monkeypatch.undo()
        fill(tmp_path, url)
    else:
        assert re.search(words, ""), "it was taken"
    assert list(texts(tmp_path).values()) == [TEXT]
    assert list(cache(tmp_path).values()) == [FILES[name]]
    assert time.monotonic() - begun < 20


# max_bytes


def lines(n: int) -> list[str]:
    """Lines that do not compress well."""
    draw = random.Random(0)
    return [f"{i} {draw.getrandbits(400):x}" for i in range(n)]


@functools.cache
def many(name: str) -> bytes:
    """A file of about 2.7 MB of text, packed as its name says."""
    drawn = lines(25_000)
    text = "\n".join(drawn)
    if ".jsonl" in name:
        text = "".join(json.dumps({"id": "x" * 50, "text": line}) + "\n" for line in drawn)
    content, file = text.encode(), io.BytesIO()
    if ".tar" in name:
        with tarfile.open(fileobj=file, mode="w:gz" if name.endswith("gz") else "w") as archive:
            for i in range(40):
                member = tarfile.TarInfo(f"{i:02}.txt")
                member.size = len(content) // 40
                archive.addfile(member, io.BytesIO(content[i * member.size :]))
        return file.getvalue()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", content)
        return file.getvalue()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": drawn}), file)
        return file.getvalue()
    packers = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": functools.partial(lzma.compress, preset=0),
        "zst": zstandard.compress,
    }
    return packers.get(name.rpartition(".")[2], bytes)(content)


MANY = ["big.txt", "big.jsonl", "big.txt.gz", "big.jsonl.bz2", "big.txt.xz", "big.txt.zst", "big.tar", "big.tar.gz"]
WHOLE = ["big.zip", "big.parquet"]  # their index is at the end


@pytest.mark.parametrize("name", [*MANY, *WHOLE])
@pytest.mark.parametrize("max_bytes", [1000, 300_000])
def test_max_bytes_takes_the_beginning_and_a_later_run_continues(
    server: Server, tmp_path: Path, name: str, max_bytes: int
) -> None:
    file = FILES[name] = OLDER[name] = many(name)
    (tmp_path / name).write_bytes(file)
    cut_here = fill(tmp_path, name, max_bytes=max_bytes).manifest.files
    expected, url = texts(tmp_path), f"{server.url}/right/{name}"
    taken = fill(tmp_path, url, max_bytes=max_bytes).manifest
    assert texts(tmp_path) == expected
    assert [file.sha256 for file in taken.files] == [file.sha256 for file in cut_here]
    kept = {name.rpartition(".")[2]: content for name, content in cache(tmp_path).items()}
    if name in WHOLE:
        assert list(kept.values()) == [file]
        return
    assert set(kept) == {"partial", "json"}
    assert file.startswith(kept["partial"])
    block = 900_000 if "bz2" in name else 131_072  # the unit of decompression
    assert len(kept["partial"]) < 2 * max(max_bytes, block) + 65_536
    n_asked = server.times["right", name]
    assert fill(tmp_path, url, max_bytes=max_bytes).manifest == taken
    assert server.times["right", name] == n_asked  # the part on disk is enough
    fill(tmp_path, url)
    assert list(cache(tmp_path).values()) == [file]
    assert fill(tmp_path, url, max_bytes=max_bytes).manifest == taken  # the whole file gives the same bytes
    assert texts(tmp_path) == expected


@pytest.mark.parametrize("kind", ["chunked", "no_length", "cut_then_the_rest_of_another", "packed_unasked"])
@pytest.mark.parametrize("name", ["big.txt", "big.tar.gz"])
def test_max_bytes_works_with_a_server_without_ranges_and_one_that_changes(
    server: Server, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MOST_UNTOLD", 10_000_000)
    server.times.clear()
    file = FILES[name] = many(name)
    OLDER[name] = file[:400_000] + bytes(len(file) - 400_000)
    (tmp_path / name).write_bytes(file)
    fill(tmp_path, name, max_bytes=300_000)
    expected = texts(tmp_path)
    fill(tmp_path, f"{server.url}/{kind}/{name}", max_bytes=300_000)
    assert texts(tmp_path) == expected


def test_a_name_as_long_as_a_file_system_takes_is_fetched(server: Server, tmp_path: Path) -> None:
    for name in ("n" * 241 + ".txt", "é" * 125 + ".txt", "%C3%A9" * 125 + ".txt"):
        FILES[name if "%" in name else urllib.parse.quote(name)] = b"A text.\n"
        OLDER.update(FILES)
        fill(tmp_path, f"{server.url}/right/{name}")
        assert list(texts(tmp_path).values()) == ["A text.\n"]
    with pytest.raises(UserError, match="a file name of at most 255 bytes"):
        fill(tmp_path, f"{server.url}/right/{'n' * 256}")


@pytest.mark.parametrize("url", ["http://[::1/x.txt", "http://a:b/x.txt", "http://a:99999/x", "http://a/x%00.txt"])
def test_what_is_not_an_address_is_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="download.source=http"):
        fill(tmp_path, url)


def test_a_state_that_is_damaged_starts_again(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/right/text.txt"
    for state in (b"", b"[1]", b"{}", b'{"url": %b, "validator": 5, "total": 9}', b"[" * 100_000, b"\xff"):
        path = tmp_path / "cache" / fetch.cache_name(url, "text.txt")
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".partial").write_bytes(b"old")
        path.with_name(path.name + ".partial.json").write_bytes(state.replace(b"%b", json.dumps(url).encode()))
        fill(tmp_path, url)
        assert list(texts(tmp_path).values()) == [TEXT]
