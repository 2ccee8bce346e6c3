"""Installing: what make does before the first run, and what `pip install .` installs."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
REQUIREMENTS = {str(Requirement(line)) for line in LINES if line}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel that `pip install .` builds."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tinygpt", folder / "tinygpt", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import setuptools.build_meta as build; build.build_wheel('out')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return ZipFile(next((folder / "out").glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Distribution:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return PathDistribution(zipfile.Path(wheel, f"{folder}/"))


def test_the_package_needs_what_requirements_txt_has(metadata: Distribution) -> None:
    assert {str(Requirement(line)) for line in metadata.requires} == REQUIREMENTS
    assert "dependencies" not in PROJECT["project"]  # versions are in one place only


def test_the_command_is_the_function_that_python_m_tinygpt_calls(metadata: Distribution) -> None:
    (command,) = metadata.entry_points
    assert (command.name, command.load()) == ("tinygpt", importlib.import_module("tinygpt.cli.main").main)


def test_the_package_holds_every_file_of_the_library(wheel: ZipFile) -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tinygpt").rglob("*") if path.is_file()}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert packed == {file for file in files if "__pycache__" not in file}


def test_the_citation_is_of_this_version_and_the_workflow_calls_what_ci_runs() -> None:
    citation = YAML(typ="safe", pure=True).load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    workflow = YAML(typ="safe", pure=True).load(ROOT / ".github/workflows/ci.yml")
    assert workflow["jobs"]["check"]["steps"][-1] == {"run": ".ci/run"}


def test_the_same_pythons_are_supported_everywhere() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()


def steps(folder: Path, *arguments: str) -> str:
    """The commands that `make install` would run in a folder."""
    done = subprocess.run(["make", "-n", "install", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that looks as if make had made a .venv there."""
    folder = tmp_path / "project"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    shutil.copy(ROOT / "requirements.txt", folder)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv/requirements.installed").write_text(f"{(folder / '.venv').resolve()}\n")
    return folder


def test_a_venv_is_made_again_where_its_folder_was_renamed_or_its_python_is_gone(installed: Path) -> None:
    assert "Nothing to be done" in steps(installed)
    moved = installed.rename(installed.with_name("renamed"))
    assert re.search("made in another folder.*venv --clear .venv", steps(moved), re.DOTALL)
    moved.rename(installed)
    (installed / ".venv/bin/python").unlink()
    assert "venv --clear .venv" in steps(installed)


def test_torch_comes_from_the_requested_index(installed: Path) -> None:
    (installed / ".venv/requirements.installed").unlink()
    pinned = next(line for line in LINES if line.startswith("torch=="))
    asked = steps(installed, "TORCH=cpu")
    assert "--index-url https://download.pytorch.org/whl/cpu" in asked
    command = re.search(r"\$\((grep .*)\)", asked)[1]
    assert subprocess.check_output(command, shell=True, cwd=installed, text=True).strip() == pinned
    plain = steps(installed)
    assert "download.pytorch.org" not in plain
    assert plain.index("make repro TORCH=cpu") < plain.index("-r requirements.txt")  # the advice comes before 5 GB do
    assert "--quiet" not in plain
