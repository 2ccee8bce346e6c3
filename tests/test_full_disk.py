"""On a full disk every program that writes says so in one line, keeps the old files, and leaves nothing half-written.

The disk is a tmpfs in its own mount namespace, which most Linux machines allow without root.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz import FACTOR, run_program, wrong_words
from project import ROOT, environment
from test_pipeline import STAGES

from tinygpt.report.page import library

pytestmark = pytest.mark.slow

COMMANDS = (
    "promote --to a",  # DVC also writes to data/base
    "import-hf data/export/hf --to a",
    "preset tiny",
    "attention --prompt The",
    "tokenizer-report",
)
PROGRAMS = [*(f"stages.{name}" for name in ("code", *STAGES)), *COMMANDS]
NEW = ["unshare", "--user", "--map-root-user", "--mount"]  # namespaces
PAGE = 4096
LIVE = (
    "reports/train.csv",
    "reports/train_norms.csv",
    "reports/train_samples.md",
)  # written at each evaluation of a training


def test_every_stage_and_command_survives_a_full_disk(done, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*NEW, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives nobody a mount namespace")
    n = round(FACTOR)
    command = [*NEW, sys.executable, __file__, str(done), str(tmp_path), str(n)]
    said = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == []
    assert found["full"] >= n * len(PROGRAMS) / 2


class Disk:
    """A small disk with a project on it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder], check=True)
        self.folder, self.project, self.log = folder, folder / "project", folder.parent / "log"

    def copy(self, source: Path) -> None:
        """Put a copy of a project on the disk."""
        self.resize("1g")
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(source, self.project, symlinks=True, ignore=shutil.ignore_patterns(".git", "cache", "runs"))

    def resize(self, size: str) -> None:
        """Make the disk larger or smaller; its files stay."""
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def leave(self, n_bytes: int) -> None:
        """Shrink the disk until only this much can be written."""
        found = os.statvfs(self.folder)
        self.resize(str((found.f_blocks - found.f_bfree) * found.f_frsize + n_bytes // PAGE * PAGE))

    def run(self, program: str) -> tuple[str, str]:
        """Run a program in a child process.  -> its last message if it failed, and what is wrong with how it ended"""
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.chdir(self.project)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd in (1, 2):
                os.dup2(log, fd)
            os.write(writer, json.dumps(run_program(program)).encode())
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with open(reader) as answer:
            said, fault, _ = json.loads(answer.read() or '["", "dies", false]')
        return said, fault or wrong_words(said + self.log.read_text()) or ("dies" if status else "")


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file except checkpoints and train.json, which has times."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "train.json")
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {name: digest for name, digest in found.items() if not name.startswith("runs/") or ".partial" in name}


def written(folder: Path, since: float) -> int:
    """Bytes of the files changed since then, in whole pages."""
    files = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum(-(-file.st_size // PAGE) * PAGE for file in files if file.st_mtime > since)


def main(source: Path, folder: Path, n: int) -> None:
    """Run each program with n amounts of free space; record what went wrong, and how often the disk was full."""
    for name in STAGES:
        importlib.import_module(f"stages.{name}")  # once, before forking
    library()
    disk, rng, faults, full = Disk(folder / "disk"), random.Random(0), list[str](), 0
    for program in PROGRAMS:
        disk.copy(source)
        before, began = tree(disk.project), time.time()
        assert disk.run(program) == ("", ""), (program, disk.run(program), disk.log.read_text())
        after, need = tree(disk.project), written(disk.project, began)
        for room in (rng.randrange(need // 2) for _ in range(n)):
            disk.copy(source)
            disk.leave(room)
            said, fault = disk.run(program)
            full += said != ""
            if not fault and said and (not said.startswith("error: no room to write") or said.count("\n") > 1):
                fault = said
            wanted, found = before if said else after, tree(disk.project)
            other = [name for name in found | wanted if found.get(name) != wanted.get(name)]
            if not fault and (other := [name for name in other if name not in LIVE or not said]):
                fault = f"leaves {other}"
            disk.resize("1g")
            if not fault and (disk.run(program) != ("", "") or tree(disk.project) != after):
                fault = "does not make the same afterwards"
            if fault:
                faults.append(f"{program} with room for {room} of {need} bytes: {fault}")
    (folder / "found.json").write_text(json.dumps({"faults": faults, "full": full}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
