"""Files are written whole or not at all."""

import errno
import hashlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import wait_until

from tinygpt import files
from tinygpt.errors import UserError
from tinygpt.files import (
    alone,
    atomic_folder,
    atomic_write,
    human_bytes,
    must_exist,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from tinygpt.model.weights import load_tensors, save_tensors


def in_child(action: Callable[[], object]) -> int:
    """Run the action in a child process; returns its exit status, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_text(path: Path) -> None:
    with atomic_write(path) as file:
        file.write("text")


def write_arrays(path: Path) -> None:
    with atomic_write(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def write_tensors(path: Path) -> None:
    save_tensors(path, {"a": torch.zeros(3)})


def write_folder(path: Path) -> None:
    with atomic_folder(path.parent) as folder:
        (folder / path.name).write_text("plainly")
        write_tensors(folder / "inner" / "a.safetensors")


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as file:
        file.write("héllo\n")
        assert not path.exists()
    assert path.read_bytes() == "héllo\n".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path, "wb") as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_folder(folder) as partial:
            (partial / name).write_text(name)
    assert os.listdir(folder) == ["second"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(KeyError), atomic_folder(folder) as partial:
        (partial / "new").touch()
        raise KeyError
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def write() -> None:  # a limit on file size stands for a full disk: write() fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(OSError) as caught, atomic_write(tmp_path / "big.bin", "wb") as file:
            file.write(bytes(1_000_000))
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "big.bin"))

    assert in_child(write) == 0
    assert os.listdir(tmp_path) == []


def test_json_has_the_same_bytes_each_time_and_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert read_json(path, stage="x") == {"b": 1, "a": "é"}
    for number in ("nan", "inf"):
        with pytest.raises(UserError, match=rf"a.json was not written \(.* {number}\): .*lower train.lr"):
            write_json(path, {"b": [{"ppl": float(number)}]})
    assert read_json(path, stage="x") == {"b": 1, "a": "é"}


def test_errors_name_the_stage_that_makes_the_file(tmp_path):
    with pytest.raises(UserError, match=r"no.json not found: run `dvc repro clean`"):
        must_exist(tmp_path / "no.json", stage="clean")
    (tmp_path / "bad.json").write_bytes(b'{"a": \xff')
    with pytest.raises(UserError, match=r"bad.json is not valid JSON .*: copy it again, or run `dvc repro train`"):
        read_json(tmp_path / "bad.json", stage="train")


def test_files_and_json_values_have_known_hashes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})


def test_sizes_are_printed_for_people():
    assert ", ".join(map(human_bytes, (0, 999, 1500, 2_100_000, 3 * 10**12))) == "0 B, 999 B, 1.5 kB, 2.1 MB, 3.0 TB"


def test_two_programs_that_fill_one_folder_do_not_disturb_each_other(tmp_path):
    path, abandoned = tmp_path / "folder", tmp_path / f"folder.{2**31 - 1}.partial"  # no process has this number

    def fill() -> None:
        with atomic_folder(path) as folder:
            (folder / "b").touch()

    with atomic_folder(path) as folder:
        (folder / "a").touch()
        assert in_child(fill) == 0
        assert [file.name for file in path.iterdir()] == ["b"]
        abandoned.mkdir()
    assert [file.name for file in path.iterdir()] == ["a"]
    with atomic_folder(path):
        assert not abandoned.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_two_programs_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path, abandoned = tmp_path / "file", tmp_path / f"file.{2**31 - 1}.partial"
    abandoned.touch()
    with atomic_write(path) as file:
        file.write("a" * 10)
        assert in_child(lambda: write_text(path)) == 0
        assert path.read_text() == "text"
    assert path.read_text() == "a" * 10 and os.listdir(tmp_path) == ["file"]


def test_what_another_user_left_does_not_disturb(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(1, "sticky")

    monkeypatch.setattr(Path, "unlink", refuse)
    for number in (2**31 - 1, 10**21):
        (tmp_path / f"file.{number}.partial").touch()
        write_text(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to("large")
    write_folder(tmp_path / "link" / "a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large" / "a").exists()
    assert sorted(os.listdir(tmp_path)) == ["large", "link"]


def test_a_folder_of_many_files_is_synced_at_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "MOST_SYNCED", 3)
    monkeypatch.setattr(os, "sync", lambda: synced.append("all"))
    for n, expected in [(1, []), (9, ["all"])]:
        with atomic_folder(tmp_path / str(n)) as folder:
            for i in range(n):
                (folder / str(i)).touch()
        assert synced == expected


def test_a_program_that_waits_for_another_says_so(tmp_path, capsys):
    def work() -> None:
        with alone(tmp_path / "lock", "download"):
            order.append(threading.current_thread().name)

    order: list[str] = []
    thread = threading.Thread(target=work, name="second")
    with alone(tmp_path / "lock", "download"):
        thread.start()
        wait_until(lambda: "waiting for another program that does the same work (download)" in capsys.readouterr().err)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and capsys.readouterr().err == ""


def test_what_a_program_of_another_user_is_writing_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    Path("folder.1.partial").mkdir()  # process 1 always runs
    begin = atomic_folder("folder").__enter__
    assert in_child(lambda: (os.setuid(os.getuid() or 65534), begin())) == 0  # root may signal all processes
    assert "folder.1.partial" in os.listdir()


NOT_AN_OBJECT = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"1" * 5_000 + b"}",
    "bytes": b'{"a": "\xff"}',
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": 1e999}',
    "a list": b"[1]",
    "a text": b'"\x1b]0;title\x07"',
    "nothing": b"",
    "two": b"{} {}",
    "cut": b'{"a": [1, 2',
    "control": b"{\x1b[2J}",
    "half a character": b'{"a": "\\ud800"}',
}


@pytest.mark.parametrize("raw", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
def test_what_is_not_a_json_object_is_one_line_that_names_the_file(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    remedy = "copy it again, or run `dvc repro train` if that stage made it"
    with pytest.raises(UserError, match=rf"a\.json is not valid JSON .*: {remedy}") as caught:
        read_json(tmp_path / "a.json", stage="train")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(
        UserError, match=r"a\.json is not valid JSON \(it has 1\.0 TB, more than the limit of 200\.0 MB\)"
    ):
        read_json(tmp_path / "a.json", stage="train")


def test_what_is_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("text")
    before = sorted((path.name, path.stat().st_ino) for path in tmp_path.iterdir())
    for write, kind, names in (
        (atomic_write, "regular file", ["folder", "pipe"]),
        (atomic_folder, "folder", ["text", "pipe", "link"]),
    ):
        for name in names:
            with (
                pytest.raises(UserError, match=f"{name} is not a {kind}: choose another path"),
                write(tmp_path / name),
            ):
                raise AssertionError("it was opened")
    assert sorted((path.name, path.stat().st_ino) for path in tmp_path.iterdir()) == before
    for write in (atomic_write, atomic_folder):
        with pytest.raises(OSError) as caught, write("/proc/nowhere"):
            pass
        assert caught.value.filename == "/proc/nowhere"  # not the partial file


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a.json is not (valid JSON \(it is not )?a file"):
        read_json(tmp_path / "a.json", stage="train")


@pytest.mark.parametrize("write", [write_text, write_arrays, write_tensors, write_folder])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_is_in_place_is_on_the_disk_and_has_the_mode_of_the_umask(write, umask, mode, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino) or fsync(number))
    before, path = os.umask(umask), tmp_path / "folder" / "file"
    try:
        write(path)
    finally:
        os.umask(before)
    in_place = list(path.parent.rglob("*"))
    assert path in in_place
    assert {oct(each.stat().st_mode & 0o777) for each in in_place if each.is_file()} == {oct(mode)}
    assert {each.stat().st_ino for each in [path.parent, *in_place]} <= synced


@pytest.mark.parametrize("moment", ["between two files", "after the last"])
def test_a_folder_whose_writer_is_killed_is_the_old_one(moment, tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "folder") as folder:
        write_json(folder / "old.json", {})

    def write() -> None:
        with atomic_folder(tmp_path / "folder") as folder:
            write_json(folder / "a.json", {})
            if moment == "between two files":
                os.kill(os.getpid(), signal.SIGKILL)
            write_json(folder / "b.json", {})
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            monkeypatch.setattr("shutil.rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    assert in_child(write) == -signal.SIGKILL
    names = os.listdir(tmp_path / "folder")
    assert names == ["old.json"] if moment == "between two files" else sorted(names) == ["a.json", "b.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a moment without either")
def test_a_folder_that_is_replaced_is_there_at_any_moment(tmp_path):
    folder, missed, done = tmp_path / "folder", [], threading.Event()
    folder.mkdir()

    def look() -> None:
        while not done.is_set():
            missed.extend([] if folder.exists() else [1])

    looking = threading.Thread(target=look)
    looking.start()
    for i in range(300):
        with atomic_folder(folder) as partial:
            (partial / "file").write_text(str(i))
    done.set()
    looking.join()
    assert not missed and (folder / "file").read_text() == "299"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_without_read_permission_is_reported_as_such(tmp_path):
    write_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)

    def read() -> None:
        if not os.getuid():
            os.setuid(65534)  # root may read everything, user nobody nothing
        with pytest.raises(PermissionError, match="a.safetensors"):
            load_tensors(tmp_path / "a.safetensors")

    assert in_child(read) == 0
