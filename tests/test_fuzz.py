"""Damaged files of every format, a few each: `make fuzz` damages more."""

import ctypes
import shutil
from pathlib import Path

import pytest
from fuzz import FORMATS, SLOW, Format, add_foreign, failures
from project import made_once


@pytest.fixture(scope="session")
def sound(done, tmp_path_factory) -> Path:
    """A project after all stages, with files of all formats."""

    def make(folder: Path) -> None:
        shutil.copytree(done, folder)
        add_foreign(folder)

    return made_once(tmp_path_factory.getbasetemp(), "sound", make)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_taken_or_refused_in_one_line(name, sound):
    assert failures(name, sound=sound, n=5 if name in SLOW else 12) == []


def dies() -> None:
    ctypes.string_at(0)


def fails() -> None:
    raise IndexError


def eats() -> None:
    bytearray(1_100_000_000)[::4096] = bytes(268_555)


def steers() -> None:
    print("error: \x1b]0;a title\x07")


@pytest.mark.parametrize(
    "read, fault", [(dies, "SIGSEGV"), (fails, "IndexError"), (eats, "takes 1 GB"), (steers, r"prints '\x1b'")]
)
def test_the_fuzzer_notices_wrong_results(read, fault, tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (found,) = failures("any", Format(("a.txt",), (read,)), sound=tmp_path, n=2)
    assert found.startswith("any:-1 and ") and fault in found


def test_a_program_that_refuses_sound_files_tests_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (found,) = failures("any", Format(("a.txt",), ("generate --no-such-flag",)), sound=tmp_path, n=2)
    assert found.startswith("any:-1 and 0 more: generate --no-such-flag refuses sound files: ")
