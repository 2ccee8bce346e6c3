"""From download.source to data/raw: the named sources, Python's own documentation, local files and mirrors."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import platform
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from project import ROOT

from tinygpt.corpus.download import Downloaded, download
from tinygpt.corpus.folders import RawDownload, read_manifest
from tinygpt.corpus.sources import EMBEDDED, SIZES, SOURCES, DownloadParams, gutenberg_text, iter_python_docs
from tinygpt.errors import UserError
from tinygpt.params import ParamsError, from_mapping

VERSE = "To be, or not to be: that is the question.\n"
GOOD = {"source": "python-docs", "sha256": None, "max_bytes": None, "encoding": None}


def params(source: str, **changes: object) -> DownloadParams:
    return from_mapping(DownloadParams, {**GOOD, "source": source, **changes})


def fill(root: Path, source: str, **changes: object) -> Downloaded:
    """Download into `root`/raw, with local paths relative to `root`."""
    return download(params(source, **changes), root / "raw", root=root, cache=root / "cache")


def texts(root: Path) -> dict[str, str]:
    """The text files in `root`/raw by name."""
    folder = root / "raw" / "texts"
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, set as TINYGPT_MIRROR."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("TINYGPT_MIRROR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_mirror_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYGPT_MIRROR", raising=False)


# The params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "download.source is empty"),
        ({"source": 7}, "download.source=7 must be a text"),
        ({"sha256": "abc"}, "download.sha256=abc must be 64 characters"),
        ({"sha256": "A" * 64}, "download.sha256"),
        ({"max_bytes": 0}, "download.max_bytes=0 must be"),
        ({"max_bytes": 1.5}, "download.max_bytes=1.5 must be a whole number"),
        ({"max_byte": 1}, "unknown key download.max_byte .did you mean download.max_bytes"),
    ],
)
def test_bad_download_params_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        from_mapping(DownloadParams, {**GOOD, **changes}, prefix="download.")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tinyshakespere", r"neither a known source .* nor a file or folder.*did you mean tinyshakespeare"),
        ("wikitext2", "did you mean wikitext-2"),
        ("no/such/file.txt", "looked for .*no/such/file.txt"),
        ("no*such.txt", "matches no files: choose another"),
        ("a\0b/*.txt", r'"a\\u0000b/\*.txt" names no file or folder'),
        ("gutenberg:alice", "must give a book's number"),
        ("gutenberg:../1", "must give a book's number"),
        ("https:///file.txt", "must have a host"),
        ("https://host/", "and end with a file name"),
        ("https://host/..", "and end with a file name"),
    ],
)
def test_an_impossible_source_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fill(tmp_path, source)
    assert "download.source" in str(caught.value)
    assert files_below(tmp_path) == []


def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for source in ("pipe", "socket", "/dev/null"):
            with pytest.raises(UserError, match=f"source={source} is neither a known source .* nor a file or folder"):
                fill(tmp_path, source)


# Named sources


def test_every_size_is_a_named_source_with_its_row_in_the_page() -> None:
    page = (ROOT / "docs/data.md").read_text()
    for size, name in SIZES.items():
        assert SOURCES[size] is SOURCES[name]
        assert re.search(rf"^\| `{size}`, `{name}` \|.* {SOURCES[name].licence} \|", page, re.MULTILINE), size


def test_named_sources_say_what_the_other_stages_need() -> None:
    for name, source in SOURCES.items():
        assert source.licence, name
        assert source.remotes or source is EMBEDDED, name
        assert all(remote.url.startswith("https://") for remote in source.remotes), name
        assert set(source.splits.values()) <= {"train", "val", "test"}, name


def test_a_mirror_folder_serves_a_named_source_under_either_name(mirror: Path, tmp_path: Path) -> None:
    content = VERSE.encode()
    for name in ("tinyshakespeare.txt", "input.txt"):
        (mirror / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} has sha256 .*, expected 86c4e6aa"):  # so it was found
            fill(tmp_path, "tinyshakespeare")
        fill(tmp_path, "tinyshakespeare", sha256=hashlib.sha256(content).hexdigest())
        assert texts(tmp_path) == {"tinyshakespeare.txt": VERSE}
        fill(tmp_path, "tiny", sha256=hashlib.sha256(content).hexdigest())  # the source by its size
        assert texts(tmp_path) == {"tinyshakespeare.txt": VERSE}
        (mirror / name).unlink()


def test_the_manifest_does_not_depend_on_the_mirror(mirror: Path, tmp_path: Path) -> None:
    (mirror / "pg7.txt").write_text(
        f"x\n*** START OF THE PROJECT GUTENBERG EBOOK 7 ***\n{VERSE}*** END OF THE PROJECT GUTENBERG EBOOK 7 ***\n"
    )
    fill(tmp_path, "gutenberg:7")
    manifest = (tmp_path / "raw" / "manifest.json").read_text()
    assert "https://www.gutenberg.org/cache/epub/7/pg7.txt" in manifest
    assert str(tmp_path) not in manifest


def test_a_mirror_that_is_not_there_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGPT_MIRROR", "nowhere")
    with pytest.raises(UserError, match="TINYGPT_MIRROR=nowhere is neither a folder"):
        fill(tmp_path, "tinyshakespeare")
    for other in ("~nobody/m", "ftp://127.0.0.1"):
        monkeypatch.setenv("TINYGPT_MIRROR", other)
        with pytest.raises(UserError, match=f"TINYGPT_MIRROR={other} is neither a folder"):
            fill(tmp_path, "tinyshakespeare")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server's address, and the folder that it serves."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_url_is_downloaded_and_kept_for_the_next_time(site: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = site
    (folder / "verse.txt").write_text(VERSE)
    fill(tmp_path, f"{address}/verse.txt")
    (folder / "verse.txt").unlink()
    manifest = fill(tmp_path, f"{address}/verse.txt", max_bytes=20).manifest
    assert manifest.downloads == (
        RawDownload(url=f"{address}/verse.txt", sha256=hashlib.sha256(VERSE.encode()).hexdigest()),
    )
    assert texts(tmp_path) == {"verse.txt": VERSE[:20]}


def test_two_programs_take_turns_with_one_cache(site: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = site
    (folder / "verse.txt").write_text(VERSE)
    second = threading.Thread(target=fill, args=(tmp_path, f"{address.replace('http', 'HTTP')}/verse.txt"))
    with FileLock(tmp_path / "cache.lock"):
        second.start()
        second.join(0.2)
        assert not (tmp_path / "cache").exists()
    second.join()
    assert texts(tmp_path) == {"verse.txt": VERSE}


def test_two_addresses_with_one_base_name_are_two_downloads(site: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = site
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "input.txt").write_text(name * 10)
        fill(tmp_path, f"{address}/{name}/input.txt")
        assert texts(tmp_path) == {"input.txt": name * 10}


def test_a_mirror_on_the_web_comes_first_and_the_real_address_second(
    site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = site
    monkeypatch.setenv("TINYGPT_MIRROR", f"{address}/mirror/")
    (folder / "mirror").mkdir()
    (folder / "mirror" / "one.txt").write_text("from the mirror")
    (folder / "one.txt").write_text("not from the mirror")
    (folder / "two.txt").write_text("from the real address")
    fill(tmp_path, f"{address}/one.txt")
    assert texts(tmp_path) == {"one.txt": "from the mirror"}
    fill(tmp_path, f"{address}/two.txt")
    assert texts(tmp_path) == {"two.txt": "from the real address"}


def test_wikitext_comes_with_its_splits_and_without_the_rest(mirror: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(mirror / "wikitext-2-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", f" \n = {part} = \n \n text \n")
        archive.writestr("wikitext-2-raw/README", "not a part of it")
    manifest = fill(tmp_path, "wikitext-2").manifest
    assert [(file.name, file.split) for file in manifest.files] == [
        ("wikitext-2-raw-v1/wikitext-2-raw/wiki.train.raw", "train"),
        ("wikitext-2-raw-v1/wikitext-2-raw/wiki.valid.raw", "val"),
        ("wikitext-2-raw-v1/wikitext-2-raw/wiki.test.raw", "test"),
    ]


def test_tinystories_come_with_their_splits_and_take_no_single_hash(mirror: Path, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (mirror / f"TinyStoriesV2-GPT4-{part}.txt").write_text(VERSE)
    assert [file.split for file in fill(tmp_path, "tinystories").manifest.files] == ["train", "val"]
    with pytest.raises(UserError, match=r"download\.sha256 must be null: tinystories holds 2 files"):
        fill(tmp_path, "tinystories", sha256="0" * 64)


def test_gutenberg_books_lose_their_header_and_licence() -> None:
    book = (
        b"\xef\xbb\xbfThe Project Gutenberg eBook of X\r\n\r\n"
        b"*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n\r\n"
        b"CHAPTER I.\r\n\r\n*** stars of the author ***\r\n\r\n"
        b"*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\nlicence\r\n"
    )
    assert gutenberg_text(book, "pg1.txt") == b"CHAPTER I.\r\n\r\n*** stars of the author ***\n"
    old = (
        b"*** START OF THIS PROJECT GUTENBERG EBOOK X,\nA TALE ***\ntale\n***END OF THIS PROJECT GUTENBERG EBOOK X***\n"
    )
    assert gutenberg_text(old, "pg2.txt") == b"tale\n"
    with pytest.raises(UserError, match=r"pg3\.txt lacks Project Gutenberg's START and END lines"):
        gutenberg_text(b"tale", "pg3.txt")


# Python's documentation


def make_stdlib(folder: Path) -> Path:
    """A small standard library with a few files of every kind."""
    files = {
        **{f"m{i}.py": f'"""Module number {i}."""\n' for i in range(2)},
        "pack/__init__.py": 'def f(a, *, b=1):\n  """Do f.\n\n     Well.\n  """\n  def inner():\n    "hidden"\n',
        "pack/sub.py": "if 1:\n  class C(B):\n    'A class.'\n    async def m(self): 'A method.'\n  def bare(): pass\n",
        "test/test_x.py": '"""A test."""',
        "site-packages/other.py": '"""Not the library."""',
        "not-a-module.py": '"""Not importable."""',
        "danger.py": "raise SystemExit('executed')",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_python_docs_are_one_document_a_module_and_a_topic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "\nTopic b.\n\n", "a": "Topic a."})
    documents = list(iter_python_docs(make_stdlib(tmp_path)))
    assert documents[:2] == ["module m0\n\nModule number 0.\n", "module m1\n\nModule number 1.\n"]
    assert documents[2:] == [
        "pack.f(a, *, b=1)\n\nDo f.\n\nWell.\n",
        "class pack.sub.C(B)\n\nA class.\n\n\npack.sub.C.m(self)\n\nA method.\n",
        "Topic a.\n",
        "Topic b.\n",
    ]


def test_python_docs_need_the_sources_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"download\.source=python-docs needs the sources"):
        list(iter_python_docs(tmp_path))


def test_the_default_source_needs_no_network_and_gives_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python-docs\.jsonl has sha256 .*, expected 000") as caught:
        fill(tmp_path, "python-docs", sha256="0" * 64)
    assert files_below(tmp_path) == []
    found = re.findall("[0-9a-f]{64}", str(caught.value))[0]
    manifest = fill(tmp_path, "python-docs", sha256=found).manifest
    (file,) = manifest.files
    assert manifest.python == platform.python_version()
    assert (file.url, file.sha256) == (None, found)
    assert 1_500_000 < file.bytes < 4_000_000
    documents = [json.loads(line)["text"] for line in texts(tmp_path)["python-docs.jsonl"].split("\n")[:-1]]
    assert any("json.dumps(obj, *, skipkeys=False" in text for text in documents)


# Local files


def test_a_local_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"a\r\nb\xff")
    manifest = fill(tmp_path, "own.txt").manifest
    assert (tmp_path / "raw/texts/own.txt").read_bytes() == b"a\r\nb\xff"
    assert read_manifest(tmp_path / "raw") == manifest
    assert str(tmp_path) not in (tmp_path / "raw" / "manifest.json").read_text()


def test_a_folder_is_taken_whole_except_for_hidden_and_binary_files(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name, content in {
        "b.md": b"two\n",
        "a/deep.rst": b"one\n",
        "manifest.json": b"{}\n",
        "picture.png": b"\x89PNG\0\0",
        ".git/config": b"secret",
        "noise.dat": bytes(range(128, 256)) * 100,
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(content)
    downloaded = fill(tmp_path, "own")
    assert texts(tmp_path) == {"a/deep.rst": "one\n", "b.md": "two\n", "manifest.json": "{}\n"}
    assert str(downloaded.notes) == "left out: 1 hidden (.git), 2 binary (noise.dat, picture.png)"
    assert [file.name for file in downloaded.manifest.files] == ["a/deep.rst", "b.md", "manifest.json"]


@pytest.mark.parametrize("pattern", ["own/*.txt", "{root}/own/*.txt", "own/**/*.txt", "ow[n]/?.txt"])
def test_a_glob_takes_what_it_matches(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "own").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "own" / name).write_text(name)
    fill(tmp_path, pattern.format(root=tmp_path))
    assert sorted(texts(tmp_path).values()) == ["a.txt", "b.txt"]


def test_packed_local_files_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.txt.gz").write_bytes(gzip.compress(b"one\n"))
    with zipfile.ZipFile(tmp_path / "own" / "y.zip", "w") as archive:
        archive.writestr("a/b.txt", "two\n")
    fill(tmp_path, "own")
    assert texts(tmp_path) == {"x.txt": "one\n", "y/a/b.txt": "two\n"}


def test_an_empty_file_is_left_out_under_a_packed_name_too(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name, content in {"a.txt": VERSE, "b.gz": "", "c.zip": ""}.items():
        (tmp_path / "own" / name).write_text(content)
    assert str(fill(tmp_path, "own").notes) == "left out: 2 empty (b.gz, c.zip)"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.txt").write_text("one")
    (tmp_path / "own" / "x.txt.gz").write_bytes(gzip.compress(b"two"))
    with pytest.raises(UserError, match=r"two files named x\.txt"):
        fill(tmp_path, "own")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.png").write_bytes(b"\0")
    with pytest.raises(UserError, match="holds no text .left out: 1 binary .x.png..: choose another"):
        fill(tmp_path, "own")


def test_a_folder_that_holds_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(VERSE)
    with pytest.raises(UserError, match="put the texts into a folder of their own"):
        fill(tmp_path, ".")


def test_the_hash_of_a_local_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(VERSE)
    fill(tmp_path, "own.txt", sha256=hashlib.sha256(VERSE.encode()).hexdigest())
    with pytest.raises(UserError, match=r"own\.txt has sha256"):
        fill(tmp_path, "own.txt", sha256="0" * 64)
    assert texts(tmp_path) == {"own.txt": VERSE}  # the old text stays


def test_one_hash_for_a_folder_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in "ab":
        (tmp_path / "own" / name).write_text(VERSE)
    with pytest.raises(UserError, match=r"download\.sha256 must be null: own holds 2 files"):
        fill(tmp_path, "own", sha256="0" * 64)


# max_bytes


@pytest.mark.parametrize(
    ("text", "max_bytes", "kept"),
    [
        ("one\ntwo\nthree\n", 9, "one\ntwo\n"),
        ("one\ntwo\n", 8, "one\ntwo\n"),
        ("one\ntwo\n", 7, "one\n"),
        ("one long line", 5, "one l"),
        ("ééé", 3, "é"),
        ("€uro", 2, None),  # not one whole character
        ("a€", 3, "a"),
        ("𝄞𝄞", 7, "𝄞"),
    ],
)
def test_max_bytes_cuts_at_a_line_else_at_a_character(
    tmp_path: Path, text: str, max_bytes: int, kept: str | None
) -> None:
    (tmp_path / "own.txt").write_text(text)
    if kept is None:
        with pytest.raises(UserError, match=r"download\.max_bytes=2"):
            fill(tmp_path, "own.txt", max_bytes=max_bytes)
    else:
        fill(tmp_path, "own.txt", max_bytes=max_bytes)
        assert texts(tmp_path) == {"own.txt": kept}


def test_max_bytes_counts_all_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in "abc":
        (tmp_path / "own" / name).write_text("1234\n6789\n")
    fill(tmp_path, "own", max_bytes=16)
    assert texts(tmp_path) == {"a": "1234\n6789\n", "b": "1234\n"}


def test_max_bytes_cuts_jsonl_between_documents_and_counts_their_text(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "é" * 5, "id": i}) + "\n" for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    fill(tmp_path, "own.jsonl", max_bytes=25)
    assert texts(tmp_path) == {"own.jsonl": "".join(lines[:2])}


def test_max_bytes_of_a_broken_jsonl_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match=r"own\.jsonl line 2 .* rename the file"):
        fill(tmp_path, "own.jsonl", max_bytes=25)
    (tmp_path / "own.txt").write_text('{"text": "a"}\n' * 21 + "no JSON\n")  # known as JSON lines under any name
    with pytest.raises(UserError, match=r"own\.txt\.jsonl line 22 .*: fix it, or remove it"):
        fill(tmp_path, "own.txt", max_bytes=25)


def test_max_bytes_holds_for_each_official_split(mirror: Path, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (mirror / f"TinyStoriesV2-GPT4-{part}.txt").write_text(VERSE * 3)
    fill(tmp_path, "tinystories", max_bytes=2 * len(VERSE))
    assert list(texts(tmp_path).values()) == [VERSE * 2, VERSE * 2]


def test_a_manifest_of_another_version_is_reported(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(VERSE)
    manifest = dataclasses.asdict(fill(tmp_path, "own.txt").manifest)
    manifest["colour"] = "red"
    (tmp_path / "raw" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="run `dvc repro -f download`"):
        read_manifest(tmp_path / "raw")
