"""Damaged files of every format, a few each: `make fuzz` damages more."""

import shutil
from pathlib import Path

import pytest
from fuzz import FORMATS, add_foreign, failures
from project import made_once


@pytest.fixture(scope="session")
def sound(done, tmp_path_factory) -> Path:
    """A project after all stages, with files of all kinds."""

    def make(folder: Path) -> None:
        shutil.copytree(done, folder)
        add_foreign(folder)

    return made_once(tmp_path_factory.getbasetemp(), "sound", make)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_taken_or_refused_in_one_line(name, sound):
    assert failures(name, sound=sound, n=20) == []
