"""Downloads from a real server that misbehaves, and malicious archives."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard

from tinygpt.corpus import fetch as fetch_module
from tinygpt.corpus.archive import iter_members
from tinygpt.corpus.fetch import ATTEMPTS, BACKOFF_S, CHUNK_BYTES, NotThereError, fetch
from tinygpt.errors import UserError

BODY = bytes(range(256)) * 2000  # 512 kB
SHA256 = hashlib.sha256(BODY).hexdigest()
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Gives the server's scripted answers, one after the other, then right ones."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        script = self.server.script
        (script.pop(0) if script else serve)(self)

    def answer(self, status: int, body: bytes, **headers: object) -> None:
        """Send a whole answer; `Content_Length` may lie, and a lie ends the connection."""
        headers = {"Content_Length": len(body), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.server.sent += len(body)  # before sending, as the test looks at once
        self.wfile.write(body)
        self.close_connection = headers["Content_Length"] != len(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.asked: list[str | None] = []  # the Range of each request
        self.sent = 0  # bytes of bodies
        self.url = f"http://127.0.0.1:{self.server_port}/text.txt"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a download would have waited."""
    seconds: list[float] = []
    monkeypatch.setattr(fetch_module, "sleep", seconds.append)
    return seconds


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def serve(handler: Handler, body: bytes = BODY, etag: str = '"one"', begin_shift: int = 0) -> None:
    """Answer correctly, with ranges for clients that have the right version."""
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if asked and handler.headers.get("If-Range") == etag:
        begin = int(asked[1]) + begin_shift
        if begin >= len(body):
            handler.answer(416, b"")
        else:
            part = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            handler.answer(206, body[begin:], ETag=etag, Content_Range=part)
    else:
        handler.answer(200, body, ETag=etag)


def break_off(after: int, **headers: object) -> Answer:
    headers = {"ETag": '"one"', **headers}
    return lambda handler: handler.answer(200, BODY[:after], Content_Length=len(BODY), **headers)


def status(code: int) -> Answer:
    return lambda handler: handler.answer(code, b"no")


def redirect(to: str) -> Answer:
    return lambda handler: handler.answer(302, b"", Location=to)


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file != path)


def test_a_whole_file_appears_under_its_name_and_nothing_else_stays(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "text.txt"
    assert fetch(server.url, path, sha256=SHA256) == (path, True)
    assert path.read_bytes() == BODY
    assert leftovers(path) == []


def test_a_file_that_is_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(BODY)
    assert fetch(server.url, path) == (path, True)
    assert server.asked == []


def test_a_file_that_is_there_with_other_bytes_is_fetched_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"old")
    fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == BODY


def test_a_broken_transfer_continues_where_it_ended(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.script = [break_off(100_000)]
    path = tmp_path / "text.txt"
    fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-"]
    assert server.sent == 100_000 + len(BODY) - 100_000
    assert waits == [BACKOFF_S]


def test_a_killed_download_continues_in_the_next_run(server: Server, tmp_path: Path) -> None:
    path, killed = tmp_path / "text.txt", threading.Event()

    def stall(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.send_header("ETag", '"one"')
        handler.end_headers()
        handler.server.sent += 200_000
        handler.wfile.write(BODY[:200_000])
        handler.wfile.flush()
        killed.wait(20)

    server.script = [stall]
    code = "import sys, pathlib, tinygpt.corpus.fetch as f; f.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(path)])
    partial = tmp_path / "text.txt.partial"
    while not partial.exists() or partial.stat().st_size < 150_000:
        assert child.poll() is None
        threading.Event().wait(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    size = partial.stat().st_size
    killed.set()
    fetch(server.url, path, sha256=SHA256)
    assert server.asked == [None, f"bytes={size}-"]
    assert server.sent == 200_000 + len(BODY) - size


def test_a_download_killed_before_its_renaming_asks_for_nothing(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    server.script = [break_off(100_000)] * ATTEMPTS
    with pytest.raises(UserError):
        fetch(server.url, path)
    (tmp_path / "text.txt.partial").write_bytes(BODY)
    server.asked.clear()
    fetch(server.url, path, sha256=SHA256)
    assert server.asked == []


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.script = [break_off(100_000), lambda handler: handler.answer(200, BODY, ETag='"one"')]
    path = tmp_path / "text.txt"
    fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == BODY


def test_a_changed_file_starts_again(server: Server, tmp_path: Path) -> None:
    new = b"new" * 100_000
    server.script = [break_off(100_000), lambda handler: serve(handler, new, '"two"')]
    path = tmp_path / "text.txt"
    fetch(server.url, path)
    assert path.read_bytes() == new


def test_without_etag_and_date_nothing_is_continued(server: Server, tmp_path: Path) -> None:
    def anonymous(handler: Handler) -> None:
        handler.answer(200, BODY[:1000], Content_Length=len(BODY))

    server.script = [anonymous]
    fetch(server.url, tmp_path / "text.txt", sha256=SHA256)
    assert server.asked == [None, None]


def test_a_part_other_than_the_requested_one_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.script = [break_off(100_000), lambda handler: serve(handler, begin_shift=7)]
    path = tmp_path / "text.txt"
    fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == BODY


def test_a_file_that_shrank_starts_again(server: Server, tmp_path: Path) -> None:
    server.script = [break_off(100_000), status(416)]
    fetch(server.url, tmp_path / "text.txt", sha256=SHA256)
    assert server.asked == [None, "bytes=100000-", None]


def test_a_busy_server_is_asked_again_with_growing_waits(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.script = [status(500), status(503), status(429)]
    fetch(server.url, tmp_path / "text.txt", sha256=SHA256)
    assert waits == [BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S]


def test_progress_gives_new_attempts(server: Server, tmp_path: Path) -> None:
    def dribble(handler: Handler) -> None:
        begin = int(re.findall(r"\d+", handler.headers.get("Range", "0"))[0])
        part = {"Content_Range": f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}"} if begin else {}
        code = 206 if begin else 200
        handler.answer(code, BODY[begin : begin + CHUNK_BYTES], Content_Length=len(BODY) - begin, ETag='"one"', **part)

    server.script = [dribble] * (ATTEMPTS + 1)
    fetch(server.url, tmp_path / "text.txt", sha256=SHA256)


def test_giving_up_says_why_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    server.script = [break_off(100_000)] + [status(500)] * ATTEMPTS
    with pytest.raises(UserError, match=r"answered 500 .*; the download will continue after 100\.0 kB"):
        fetch(server.url, tmp_path / "text.txt")
    assert not (tmp_path / "text.txt").exists()
    assert (tmp_path / "text.txt.partial").stat().st_size == 100_000


def test_a_server_that_always_promises_too_much_is_an_error(server: Server, tmp_path: Path) -> None:
    server.script = [lambda handler: handler.answer(200, b"abc", Content_Length=10)] * ATTEMPTS
    with pytest.raises(UserError, match="cannot download"):
        fetch(server.url, tmp_path / "text.txt")
    assert not (tmp_path / "text.txt").exists()


def test_a_missing_file_is_reported_at_once(server: Server, tmp_path: Path) -> None:
    server.script = [status(404)]
    with pytest.raises(NotThereError, match=r"text\.txt: the server answered 404"):
        fetch(server.url, tmp_path / "text.txt")
    assert len(server.asked) == 1


def test_an_unreachable_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Connection refused") as caught:
        fetch("http://127.0.0.1:1/x.txt", tmp_path / "x.txt")
    assert "\n" not in str(caught.value)


def test_wrong_bytes_stay_as_the_hash_may_have_a_typo_and_both_hashes_are_reported(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(UserError, match=f"text.txt has sha256 {SHA256}, expected {'0' * 64}"):
        fetch(server.url, path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == [path]
    n_before = len(server.asked)
    assert fetch(server.url, path, sha256=SHA256) == (path, True) and len(server.asked) == n_before
    with pytest.raises(UserError, match="expected 1111"):
        fetch(server.url, path, sha256="1" * 64)  # it may have changed on the server, so it is fetched again
    assert len(server.asked) == n_before + 1 and path.read_bytes() == BODY


def test_a_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    server.script = [redirect("/elsewhere"), redirect(server.url)]
    fetch(server.url, tmp_path / "text.txt", sha256=SHA256)
    assert len(server.asked) == 3


def test_a_redirect_loop_ends(server: Server, tmp_path: Path) -> None:
    server.script = [redirect("/again")] * 100
    with pytest.raises(UserError, match="redirects"):
        fetch(server.url, tmp_path / "text.txt")


def test_a_redirect_may_not_leave_http(server: Server, tmp_path: Path) -> None:
    server.script = [redirect("file:///etc/passwd")]
    with pytest.raises(UserError, match="cannot download"):
        fetch(server.url, tmp_path / "text.txt")


def test_more_than_the_disk_holds_is_refused_before_it_begins(server: Server, tmp_path: Path) -> None:
    server.script = [lambda handler: handler.answer(200, b"abc", Content_Length=10**18)]
    with pytest.raises(UserError, match=r"needs 1000000\.0 TB"):
        fetch(server.url, tmp_path / "text.txt")


# Archives


def members(path: Path) -> dict[str, bytes]:
    return {name: b"".join(chunks) for name, chunks in iter_members(path)}


def tar_with(path: Path, mode: str = "w", **changes: object) -> Path:
    """An archive of one member, `a/b.txt` with the content "text", with these changes."""
    member = tarfile.TarInfo("a/b.txt")
    member.size = 4
    for name, value in changes.items():
        setattr(member, name, value)
    with tarfile.open(path, mode) as archive:
        archive.addfile(member, io.BytesIO(b"text"))
    return path


def zip_with(path: Path, name: str = "a/b.txt", content: bytes = b"text", mode: int = 0) -> Path:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_tar_archives_give_their_files(tmp_path: Path, ending: str) -> None:
    mode = {"tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(ending, "w:gz")
    assert members(tar_with(tmp_path / f"x.{ending}", mode)) == {"x/a/b.txt": b"text"}


def test_zip_archives_give_their_files(tmp_path: Path) -> None:
    assert members(zip_with(tmp_path / "x.zip")) == {"x/a/b.txt": b"text"}


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zst)]
)
def test_compressed_files_give_themselves(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"x.txt.{ending}"
    path.write_bytes(compress(b"text"))
    assert members(path) == {"x.txt": b"text"}


def test_a_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    parts = [os.urandom(n) for n in (0, 5000, 1, 100_000)]
    (tmp_path / "x.txt.zst").write_bytes(b"".join(map(zst, parts)))
    assert members(tmp_path / "x.txt.zst") == {"x.txt": b"".join(parts)}


UNSAFE = ["../b.txt", "/etc/b.txt", "a/../../b.txt", "C:\\b.txt", "..\\b.txt", ".."]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unsafe name"):
        members(tar_with(tmp_path / "x.tar", name=name))
    with pytest.raises(UserError, match="unsafe name"):
        members(zip_with(tmp_path / "x.zip", name=name))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_left_out(tmp_path: Path, kind: bytes) -> None:
    assert members(tar_with(tmp_path / "x.tar", type=kind, linkname="/etc/passwd", size=0)) == {}


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    assert members(zip_with(tmp_path / "x.zip", content=b"/etc/passwd", mode=0o120777)) == {}


@pytest.mark.parametrize("ending", ["txt.gz", "txt.zst", "zip", "tar.gz"])
def test_bombs_are_refused(tmp_path: Path, ending: str) -> None:
    zeros, path = bytes(110_000_000), tmp_path / f"x.{ending}"
    if ending == "zip":
        zip_with(path, content=zeros)
    elif ending == "txt.gz":
        path.write_bytes(gzip.compress(zeros, 1))
    elif ending == "txt.zst":
        path.write_bytes(zst(zeros))
    else:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            member = tarfile.TarInfo("x")
            member.size = len(zeros)
            archive.addfile(member, io.BytesIO(zeros))
    with pytest.raises(UserError, match="more than 200 times"):
        for _, chunks in iter_members(path):
            for _ in chunks:
                pass


@pytest.mark.parametrize(
    "ending", ["txt.gz", "txt.bz2", "txt.xz", "txt.zst", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]
)
def test_cut_off_archives_are_reported_by_name(tmp_path: Path, ending: str) -> None:
    noise = os.urandom(50_000)
    path = tmp_path / f"x.{ending}"
    if ending == "zip":
        zip_with(path, content=noise)
    elif ending.startswith("tar"):
        (tmp_path / "noise").write_bytes(noise)
        with tarfile.open(
            path, {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}[ending]
        ) as archive:
            archive.add(tmp_path / "noise", "noise")
    else:
        compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}[ending[4:]]
        path.write_bytes(compress(noise))
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(UserError, match=rf"x\.{ending} is damaged"):
        members(path)


@pytest.mark.parametrize("ending", ["txt.gz", "txt.bz2", "txt.xz", "txt.zst", "zip", "tar", "tar.gz"])
def test_what_is_not_an_archive_is_reported_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match=rf"x\.{ending} is damaged"):
        members(path)


def test_a_changed_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "x.zip", content=os.urandom(1000))
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        members(path)


def test_a_zip_with_a_password_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        members(path)
