"""Users' own texts: one rule for a folder, a glob and an archive, and whatever is left out is reported."""

import errno
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from test_sources import fill, params, texts

from tinygpt.corpus import archive
from tinygpt.corpus import raw as raw_module
from tinygpt.corpus.archive import CHUNK_BYTES, UnpackError
from tinygpt.corpus.local import _fits
from tinygpt.corpus.raw import json_kind, likely_encodings, lines
from tinygpt.errors import UserError
from tinygpt.params import ParamsError

FRENCH = "Le café est servi à côté de la fenêtre où l'été s'achève, déjà là.\n" * 5
FILES = {
    "a.txt": b"one\n",
    "sub/b.txt": b"two\n",
    ".hidden.txt": b"no",
    "sub/.git/config.txt": b"no",
    "picture.txt": b"\x89PNG\0\0",
    "latin.txt": FRENCH.encode("cp1252"),
    "data.json.txt": b'{"text": "three"}\n{"text": "four", "id": 1}\n',
    "log.txt": b'{"a": 1}\n{"a": 2}\n',
    "empty.txt": b"",
}
TAKEN = {
    "a.txt": "one\n",
    "sub/b.txt": "two\n",
    "data.json.txt.jsonl": FILES["data.json.txt"].decode(),
    "log.txt": FILES["log.txt"].decode(),
}
NOTES = {
    "2 hidden (": ".hidden.txt",
    "1 binary (": "picture.txt",
    "1 empty (": "empty.txt",
    "1 not UTF-8 (": "latin.txt looks like cp1252 (`à`) or cp1250 (`ŕ`)",
    "1 as JSON lines (": "data.json.txt",
    "1 as plain text, though JSON (": "log.txt",
}


def make_own(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make_zip(own: Path) -> None:
    with zipfile.ZipFile(own.with_suffix(".zip"), "w") as archive:
        for name in FILES:
            archive.write(own / name, name)


def make_tar(own: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(own, ".")
    own.with_suffix(".tar.zst").write_bytes(zstandard.compress(packed.getvalue()))


@pytest.mark.parametrize("source", ["own", "own/**/*.txt", "own.zip", "own.tar.zst"])
def test_a_folder_a_glob_and_archives_follow_one_rule_and_report_it(tmp_path: Path, source: str) -> None:
    own = make_own(tmp_path / "own")
    make_zip(own)
    make_tar(own)
    notes = str(fill(tmp_path, source).notes)
    base = "own/" if source.startswith("own.") else ""
    assert texts(tmp_path) == {base + name: text for name, text in TAKEN.items()}
    for counted, name in NOTES.items():
        assert counted in notes and base + name in notes, notes
    assert "\n" not in notes


def test_links_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("own/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in {
        "own/more": "../elsewhere",
        "own/again": "../elsewhere/deep",
        "own/up": "..",
        "own/self": "self",
        "own/dead": "nowhere",
        "own/file.txt": "../elsewhere/b.txt",
        "elsewhere/deep/back": "../../own",
    }.items():
        (tmp_path / link).symlink_to(target)
    for source in ("own", "own/**/*"):
        notes = str(fill(tmp_path, source).notes)
        found = sorted(texts(tmp_path).values())  # one file has a link of its own, too
        assert found == ["elsewhere/b.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt", "own/a.txt"]
        assert "left out: 5 links (dead, self, " in notes


@pytest.mark.skipif(sys.platform != "linux", reason="the file that cannot be read is Linux's")
def test_an_error_of_the_disk_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        fill(tmp_path, "/proc/self/mem")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "mem")


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that everybody may read; meanwhile root becomes a user who may not read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_reported(as_nobody: Path) -> None:
    for name in ("own/a.txt", "own/b.txt", "own/sub/c.txt"):
        (as_nobody / name).parent.mkdir(parents=True, exist_ok=True)
        (as_nobody / name).write_text(name)
    (as_nobody / "own/b.txt").chmod(0)
    (as_nobody / "own/sub").chmod(0)
    os.mkfifo(as_nobody / "own/pipe.txt")
    for source in ("own", "own/**/*.txt"):
        notes = str(fill(as_nobody, source).notes)
        assert texts(as_nobody) == {"a.txt": "own/a.txt"}
        assert notes == "left out: 1 special files (pipe.txt), 2 unreadable (b.txt, sub)" or notes == (
            "left out: 2 unreadable (b.txt, sub), 1 special files (pipe.txt)"
        )


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("**", "a/b/c", True),
        ("*.txt", "a.txt", True),
        ("*.txt", "a/b.txt", False),
        ("**/*.txt", "a.txt", True),
        ("**/*.txt", "a/b/c.txt", True),
        ("a/*/c", "a/b/c", True),
        ("a/*/c", "a/b/d/c", False),
        ("a/**/c", "a/c", True),
        ("[ab]?", "bc", True),
    ],
)
def test_a_pattern_names_the_files_that_fit(pattern: str, name: str, fits: bool) -> None:
    parts, names = name.split("/"), pattern.split("/")
    assert _fits(parts, names, whole=True) == fits
    if fits:
        assert all(_fits(parts[:i], names, whole=False) for i in range(len(parts)))


def test_a_glob_reports_folders_that_it_names_but_does_not_enter(tmp_path: Path) -> None:
    make_own(tmp_path / "own")
    assert "1 folders (sub)" in str(fill(tmp_path, "own/*").notes)


# Names


@pytest.mark.parametrize("pack", [None, make_tar])
def test_odd_names_are_taken_in_characters_that_can_be_shown(
    tmp_path: Path, pack: Callable[[Path], None] | None
) -> None:
    (tmp_path / "own").mkdir()
    for name in (b"caf\xe9.txt", b"a\x1b]0;title\x07\n.txt"):
        Path(os.fsdecode(bytes(tmp_path / "own") + b"/" + name)).write_text("text\n")
    if pack:
        pack(tmp_path / "own")
    notes = str(fill(tmp_path, "own.tar.zst" if pack else "own").notes)
    assert [Path(name).name for name in texts(tmp_path)] == ["a\\x1b]0;title\\x07\\n.txt", "caf\\udce9.txt"]
    assert notes.isprintable()
    assert "2 under this name" in notes


def test_a_file_and_an_archive_of_one_name_are_refused_in_words(tmp_path: Path) -> None:
    own = make_own(tmp_path / "own")
    make_zip(own)
    (own / "notes").write_text("text")
    shutil.move(own.with_suffix(".zip"), own / "notes.zip")
    with pytest.raises(
        UserError, match="two files named notes/a.txt, or a file and an archive of that name: rename one"
    ):
        fill(tmp_path, "own")
    (own / "notes").unlink()
    (own / "notes").mkdir()
    (own / "notes/a.txt").write_text("text")
    with pytest.raises(UserError, match="two files named notes/a.txt"):
        fill(tmp_path, "own")


@pytest.mark.parametrize("name", ["n" * 300, "deep/" * 300 + "x", "../x", "/x", "a\0b", "C:\\x", "."])
def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, name: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = 5
        archive.addfile(member, io.BytesIO(b"text\n"))
    (tmp_path / "x.tar").write_bytes(packed.getvalue())
    try:
        fill(tmp_path, "x.tar")
    except UserError as error:
        assert len(str(error)) < 500 and str(error).isprintable()


# Encodings


@pytest.mark.parametrize(
    ("text", "encoding", "looks_like"),
    [
        (FRENCH, "latin-1", "cp1252"),
        ("Über den grünen Hügeln möchte ich schöne Mädchen grüßen.\n" * 5, "cp1252", "cp1252"),
        ("It\u2019s a \u201cgood\u201d day \u2014 she said no more.\n" * 9, "cp1252", "cp1252"),
        ("Привет, мир! Это обычный русский текст о том, как живут люди.\n" * 9, "cp1251", "cp1251"),
        ("これは日本語の文章です。今日は天気がいいですね。\n" * 9, "shift_jis", "shift_jis"),
        ("Plain text in wide characters.\n" * 9, "utf-16", "utf_16"),
        ("Plain text in wide characters.\n" * 9, "utf-16-le", "utf_16_le"),
    ],
)
def test_another_encoding_is_guessed_and_taken_when_it_is_named(
    tmp_path: Path, text: str, encoding: str, looks_like: str
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/x.txt").write_bytes(text.encode(encoding))
    (tmp_path / "own/y.txt").write_text("naïve é", encoding="utf-8")
    assert next(iter(likely_encodings(text.encode(encoding)))) == looks_like
    notes = str(fill(tmp_path, "own").notes)
    assert notes.startswith(f"left out: 1 not UTF-8 (x.txt looks like {looks_like}")
    assert notes.endswith(
        (f": set download.encoding={looks_like})", ": set download.encoding to the one that reads well)")
    )
    notes = str(fill(tmp_path, "own", encoding=looks_like).notes)
    assert texts(tmp_path) == {"x.txt": text.encode(encoding).decode(looks_like), "y.txt": "naïve é"}
    assert notes == f"read: 1 as {looks_like} (x.txt)"


def test_encodings_that_differ_in_a_few_letters_are_shown_by_a_word(tmp_path: Path) -> None:
    czech, spanish = (
        "Příliš žluťoučký kůň úpěl ďábelské ódy, řekl žák.\n",
        "La añadidura de la niña fue muy rápida ayer.\n",
    )
    (tmp_path / "x.txt").write_bytes(spanish.encode("cp1252") * 20)
    with pytest.raises(UserError) as caught:
        fill(tmp_path, "x.txt")
    assert "`añadidura`" in str(caught.value) and "`ańadidura`" in str(caught.value)
    assert "set download.encoding to the one that reads well" in str(caught.value)
    assert [*likely_encodings(czech.encode("cp1250") * 20)] == ["cp1250"]


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis"])
def test_a_file_that_begins_in_ascii_is_read_by_its_first_other_characters(tmp_path: Path, encoding: str) -> None:
    ascii_text, text = "Plain text.\n" * 20_000, "“Naïve” – é\n" if encoding == "cp1252" else "日本語\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.txt").write_text(ascii_text)
    (tmp_path / "own/b.txt").write_text(ascii_text + text, encoding="utf-8")
    (tmp_path / "own/c.txt").write_bytes((ascii_text + text).encode(encoding))
    notes = str(fill(tmp_path, "own", encoding=encoding).notes)
    assert texts(tmp_path) == {"a.txt": ascii_text, "b.txt": ascii_text + text, "c.txt": ascii_text + text}
    assert notes == f"read: 1 as {encoding} (c.txt)"


def test_a_character_that_lies_across_two_chunks_decides(tmp_path: Path) -> None:
    text = "a" * (CHUNK_BYTES - 1) + "é und so weiter"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    assert str(fill(tmp_path, "x.txt", encoding="cp1252").notes) == ""
    assert texts(tmp_path) == {"x.txt": text}


def test_a_file_that_unpacks_to_too_much_is_not_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SMALL_BYTES", 1000)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size: unpack it by hand") as caught:
        fill(tmp_path, "x.txt.gz")
    assert not isinstance(caught.value, UnpackError)  # so that its download stays


def test_an_encoding_leaves_out_what_is_binary_or_packed_for_these_reasons(tmp_path: Path) -> None:
    make_own(tmp_path / "own")
    (tmp_path / "own/twice.gz.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    (tmp_path / "own/latin.txt").write_bytes(FRENCH.encode("cp1252") + b"\x81")
    notes = str(fill(tmp_path, "own", encoding="cp1252").notes)
    assert "1 neither UTF-8 nor cp1252 (latin.txt)" in notes and "1 binary (picture.txt)" in notes
    assert "1 packed twice (twice.gz)" in notes


def test_an_encoding_in_ascii_bytes_is_decoded_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(("Plain text.\n" * 20_000 + "日本語\n").encode("iso2022_jp"))
    fill(tmp_path, "x.txt", encoding="iso2022_jp")
    assert texts(tmp_path)["x.txt"].endswith("\n日本語\n")


def test_an_encoding_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(FRENCH.encode("cp1252") * 10_000 + b"\x81")
    with pytest.raises(UserError, match="download.encoding=cp1252 cannot decode x.txt"):
        fill(tmp_path, "x.txt", encoding="cp1252")
    for name in ("utf9", "hex", "undefined"):
        with pytest.raises(ParamsError, match=f"download.encoding={name} is not a text encoding of Python"):
            params("x", encoding=name)


def test_a_few_bad_bytes_do_not_make_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("naïve é ".encode() * 1000 + b"\xff\xff")
    assert str(fill(tmp_path, "x.txt").notes) == ""


# JSON lines


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b'{"text": "a"}', "lines"),
        (b'{"text": "a"}\r\n\r\n{"id": 1, "text": "b"}\r\n{"text": "cut o', "lines"),
        (b'\xef\xbb\xbf{"text": "a"}\n', "lines"),
        (b'{"id": 1, "text": "a longer line than the begin', "lines"),
        (b'{"a": {"text": "b"}, "c": [1, {"text": "d"}], "text": "e', "lines"),
        (b'{"a": [{"text": "of an object inside the line"}, {"text": "b', None),
        (b'{"a": "text", "b": "c', None),
        (b'{"text": 1}\n{"text": 2}\n', "other"),
        (b'[\n {"text": "a"},\n {"text": "b"}]', "other"),
        (b'{"a": 1}', None),
        (b'{\n "text": "a"\n}', None),
        (b'{"text": "a"}\nand so on\n', None),
        (b"1\n2\n", None),
        (b"[" * 100_000, None),
        (b"", None),
    ],
)
def test_json_lines_are_known_by_their_beginning(head: bytes, kind: str | None) -> None:
    assert json_kind(head) == kind


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "\xff", "id": 1}\n'.encode("latin-1"),
        b'{"id": ' + b"9" * 5000 + b', "text": "a"}\n',
        b'{"id": -1e999, "text": "\\ud800"}\n',
    ],
)
def test_odd_json_is_taken_with_a_limit_and_without(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(line)
    for max_bytes in (None, 1000):
        fill(tmp_path, "x.jsonl", max_bytes=max_bytes)
        assert (tmp_path / "raw/texts/x.jsonl").read_bytes() == line


def test_a_line_that_is_too_long_is_refused_by_its_number_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_module, "MOST_LINE", 100)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 1000}))
    with pytest.raises(UserError, match=r"x.jsonl line 2 is longer than 100 B: split its text"):
        fill(tmp_path, "x.jsonl")


@given(chunks=st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"a", b"\n")), max_size=9), most=st.integers(1, 9))
def test_lines_lose_nothing_and_end_where_they_should(chunks: list[bytes], most: int) -> None:
    found = list(lines(chunks, b"\n", most))
    assert b"".join(found) == b"".join(chunks)
    assert all(b"\n" not in line[:-1] and line for line in found)
    assert list(lines(chunks, b"\n", 1000)) == io.BytesIO(b"".join(chunks)).readlines()
