"""Files that a killed DVC left half-written are repaired, and nothing else is touched."""

import os
import shutil
import subprocess

import pytest
from project import succeed
from test_pipeline import ran
from zc.lockfile import LockFile

RWLOCK, LOCK = ".dvc/tmp/rwlock", "dvc.lock"


@pytest.fixture
def here(project, monkeypatch):
    """A project in which DVC has run."""
    monkeypatch.chdir(project)
    (project / RWLOCK).write_text("{}")
    return project


@pytest.mark.parametrize("text", ["schema: '2.0'\nstages: {}\n", "schema: '3.0'\n", "<<<<<<< HEAD\nschema: '2.0'\n"])
def test_what_is_not_cut_off_stays_as_it_is(here, command, text):
    (here / LOCK).write_text(text)  # whole; of another version; with a merge conflict
    assert command("mend") == (0, "", "")
    assert (here / LOCK).read_text() == text
    assert (here / RWLOCK).read_text() == "{}"


@pytest.mark.parametrize("until", [b"", b"s", b"    - path"])
def test_a_lock_file_that_was_cut_off_is_restored_from_git_and_dvc_runs(here, command, until):
    whole = (here / LOCK).read_bytes()
    n_bytes = whole.index(until) + len(until)
    (here / LOCK).write_bytes(whole[:n_bytes])
    (here / RWLOCK).write_bytes(b'{"write": {"'[:n_bytes])
    said = command("mend")
    assert said.returncode == 0
    first, second = said.stdout.splitlines()
    assert first.startswith(f"{RWLOCK} was cut off when DVC was killed: it was removed")
    assert second.startswith(f"{LOCK} was cut off when DVC was killed: git's version has replaced it")
    assert (here / LOCK).read_bytes() == whole
    assert (here / ".dvc/tmp/dvc.lock.cut").read_bytes() == whole[:n_bytes]
    assert not (here / RWLOCK).exists()
    if n_bytes == 0:
        assert ran(succeed("dvc repro", here)) == []


def test_where_git_has_no_lock_file_the_results_come_from_the_cache(here, command):
    succeed("git rm -q --cached dvc.lock", here)
    (here / LOCK).write_bytes(b"")
    assert f"{LOCK} was cut off when DVC was killed: it was removed" in command("mend").stdout
    assert not (here / LOCK).exists()


def test_nothing_is_mended_while_a_dvc_is_at_work(here, command):
    (here / RWLOCK).write_bytes(b"")
    lock = LockFile(str(here / ".dvc/tmp/lock"))
    assert command("mend").stderr == "error: DVC is running in this folder: wait for it, or stop it first\n"
    lock.close()
    sleep = shutil.which("sleep")
    for arguments, env in ((["dvc", "99"], {}), (["stage", "99"], {"DVC_ROOT": str(here)})):
        with subprocess.Popen(arguments, executable=sleep, cwd=here, env=os.environ | env) as process:
            message = f"error: DVC is running in this folder (process {process.pid}): wait for it, or stop it first\n"
            assert command("mend").stderr == message
            process.kill()
    assert (here / RWLOCK).exists()
    with subprocess.Popen(["dvc", "99"], executable=sleep, cwd=here.parent) as process:  # in another folder
        assert "it was removed" in command("mend").stdout
        process.kill()


def test_a_folder_that_cannot_be_written_to_is_refused_before_dvc_runs(here, command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as for a user without write permission
    said = command("mend")
    assert said.returncode == 1
    assert said.stderr.startswith(f"error: {here} is not writable: `chown` it")


def test_where_dvc_has_nothing_there_is_nothing_to_mend(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("mend") == (0, "", "")
