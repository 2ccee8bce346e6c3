"""Sources in fsspec's file systems; memory:// stands for s3:// and others."""

import gzip
import resource
from pathlib import Path

import fsspec
import pytest
from test_sources import fill, texts

from tinygpt.corpus import download
from tinygpt.errors import UserError


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    for name, content in {"a/x.txt": b"one\n", "a/y.txt.gz": gzip.compress(b"two\n"), "a/b/z.md": b"three\n"}.items():
        files.pipe(f"/bucket/{name}", content)
    yield files
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("memory://bucket/a/x.txt", {"x.txt": "one\n"}),
        ("memory://bucket/a", {"x.txt": "one\n", "y.txt": "two\n", "b/z.md": "three\n"}),
        ("memory://bucket/a/*.txt*", {"x.txt": "one\n", "y.txt": "two\n"}),
        ("memory://bucket/a/*", {"x.txt": "one\n", "y.txt": "two\n"}),
    ],
)
def test_a_file_a_folder_and_a_glob_are_read(bucket, tmp_path, source, expected):
    notes = str(fill(tmp_path, source).notes)
    assert texts(tmp_path) == expected
    assert notes == ("left out: 1 folders (b)" if source.endswith("/*") else "")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_links_are_read_and_folders_that_are_read_are_not_left_out(tmp_path):
    (tmp_path / "own/a").mkdir(parents=True)
    (tmp_path / "text").write_text("one\n")
    (tmp_path / "own/a/x.txt").symlink_to(tmp_path / "text")
    (tmp_path / "own/y.txt").write_text("two\n")
    assert str(fill(tmp_path, f"file://{tmp_path}/own/**").notes) == ""
    assert texts(tmp_path) == {"a/x.txt": "one\n", "y.txt": "two\n"}


def test_what_was_copied_before_is_not_copied_again_unless_it_changed(bucket, tmp_path, monkeypatch):
    fill(tmp_path, "memory://bucket/a/*.txt")
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "_open", None)  # nothing can be opened
        fill(tmp_path, "memory://bucket/a/*.txt")
    bucket.pipe("/bucket/a/x.txt", b"another\n")
    fill(tmp_path, "memory://bucket/a/*.txt")
    assert texts(tmp_path) == {"x.txt": "another\n"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nowhere/*.txt", "memory://nowhere/.* matches no files"),
        ("memory://nowhere", "memory://nowhere matches no files"),
        ("nosuch://bucket/x", "download.source=nosuch://bucket/x cannot be read .Protocol not known: nosuch"),
        ("s3://bucket/x", "download.source=s3://bucket/x cannot be read .Install s3fs to access S3"),
    ],
)
def test_an_address_that_gives_nothing_is_reported(tmp_path: Path, source: str, message: str):
    with pytest.raises(UserError, match=message):
        fill(tmp_path, source)


def test_a_copy_that_breaks_off_leaves_nothing_under_its_name(bucket, tmp_path, monkeypatch):
    def refuse(self: object, path: str, **options: object) -> object:
        raise PermissionError(13, "no entry")

    monkeypatch.setattr(type(bucket), "_open", refuse)
    with pytest.raises(
        UserError, match=r"memory://bucket/a cannot be read .*check the address, its package and your permissions"
    ):
        fill(tmp_path, "memory://bucket/a")
    assert not (tmp_path / "raw").exists()


def test_a_full_disk_is_not_a_fault_of_the_address(bucket, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    bucket.pipe("/bucket/big.txt", b"a line of text\n" * 10_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal
    try:
        with pytest.raises(OSError, match="File too large") as error:
            fill(tmp_path, "memory://bucket/big.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value.filename).endswith("big.txt.partial")


def test_no_more_is_copied_than_max_bytes_need(bucket, tmp_path):
    line = b"a line of text\n"
    for name, n_line in {"big/a.txt": 60_000, "big/b.txt": 60_000, "big/c.txt": 10}.items():
        bucket.pipe(f"/bucket/{name}", line * n_line)
    fill(tmp_path, "memory://bucket/big", max_bytes=1500)
    assert texts(tmp_path) == {"a.txt": line.decode() * 100}
    (copied,) = (tmp_path / "cache").iterdir()
    assert copied.name.endswith("a.txt.partial")
    assert copied.stat().st_size < 140_000
    fill(tmp_path, "memory://bucket/big")
    assert [len(text) for text in texts(tmp_path).values()] == [900_000, 900_000, 150]


def test_a_short_file_of_unknown_size_is_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(type(bucket), "size", lambda *_: None)
    copy, copied = download._copy_from_bucket, []

    def once(*args):
        assert not copied  # otherwise it would be requested again and again
        copied.append(copy(*args))
        return copied[0]

    monkeypatch.setattr(download, "_copy_from_bucket", once)
    fill(tmp_path, "memory://bucket/a/x.txt", max_bytes=1500)
    assert texts(tmp_path) == {"x.txt": "one\n"}
