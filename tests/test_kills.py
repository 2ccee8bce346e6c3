"""Killed at any moment and run again, every stage and DVC make the same bytes.

TINYGPT_FUZZ multiplies the kills: 20 means 200 of them. A seed decides when they come, so they repeat as far as the
machine's speed does.
"""

import contextlib
import hashlib
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fuzz import FACTOR
from project import environment, run, run_stages, start_stage, status_of, succeed
from test_full_disk import LIVE
from test_pipeline import STAGES
from test_structure import PIPELINE

pytestmark = pytest.mark.slow

N_STAGE, N_DVC = round(FACTOR), round(2 * FACTOR)
KILLED = STAGES if FACTOR > 1 else ["download", "encode", "evaluate", "export"]
BY_DVC = STAGES if FACTOR > 1 else ["download", "clean"]
INTERVAL_S = 5 if FACTOR > 1 else 3  # most seconds between two kills of DVC
WRITTEN_IN_PLACE = (Path(".dvc/tmp/rwlock"), Path("dvc.lock"))
OUTS = {
    name: [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics", "plots")
        for out in stage.get(kind, [])
    ]
    for name, stage in PIPELINE["stages"].items()
}


def made(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of every file that these stages have made, except the one with times."""
    paths = [folder / out for name in names for out in OUTS[name]]
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name != "train.json"
    }


def forget(folder: Path, names: list[str]) -> None:
    """Remove what stages have made, as DVC does before it runs them, and what they have half-done."""
    for path in (folder / out for name in names for out in OUTS[name]):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "runs", folder / ".dvc/cache"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("name", KILLED)
def test_a_stage_that_is_killed_leaves_no_half_file_and_ends_with_the_same_bytes(name, done, project):
    expected, rng = made(done, [name]), random.Random(name)
    forget(project, [name])
    began = time.monotonic()
    assert status_of(start_stage(name, project, "log")) == 0, (project / "log").read_text()
    seconds = time.monotonic() - began
    assert made(project, [name]) == expected != {}
    for _ in range(N_STAGE):
        forget(project, [name])
        process = start_stage(name, project, "log")
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        assert status_of(process) in (-signal.SIGKILL, 0)
        there = {path: digest for path, digest in made(project, [name]).items() if path not in LIVE}
        assert there.items() <= expected.items(), "a file is half-written"
        run_stages(name, project)
        assert made(project, [name]) == expected
    assert not list(project.rglob("*.partial"))


def test_dvc_or_what_it_runs_is_killed_and_make_repro_ends_with_the_same_bytes(done, project):
    """Each run continues where the one before was killed; after a run that finishes, all starts anew."""
    expected, rng = made(done, BY_DVC), random.Random(0)
    forget(project, BY_DVC)
    for _ in range(N_DVC):
        kill_somewhere(start_repro(project), rng, project)
        if made(project, BY_DVC) == expected:
            forget(project, BY_DVC)
    assert start_repro(project).wait() == 0, (project / "log").read_text()
    assert made(project, BY_DVC) == expected
    assert not list(project.rglob("*.partial"))


def start_repro(folder: Path) -> subprocess.Popen[bytes]:
    """Start what `make repro` does after installing, up to the stages that are killed here."""
    if run(
        "python -m tinygpt mend", folder
    ).returncode:  # something is broken, and a stage of the killed DVC still runs
        wait_for_the_end_of_all_in(folder)
        succeed("python -m tinygpt mend", folder)
    with open(folder / "log", "w") as log:
        return subprocess.Popen(["dvc", "repro", *BY_DVC], cwd=folder, env=environment(), stdout=log, stderr=log)


def kill_somewhere(dvc: subprocess.Popen[bytes], rng: random.Random, folder: Path) -> None:
    """Kill DVC, its stages, or both: at any moment, or while DVC writes one of its files."""
    path, victim, deadline = (
        rng.choice([None, *WRITTEN_IN_PLACE]),
        rng.choice("dvc stage both".split()),
        time.monotonic() + INTERVAL_S,
    )
    time.sleep(rng.uniform(0, INTERVAL_S))
    while path and dvc.poll() is None and time.monotonic() < deadline and not is_empty(folder / path):
        pass
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        stages = psutil.Process(dvc.pid).children(recursive=True) if dvc.poll() is None else []
        for process in ([dvc] if victim != "stage" else []) + (stages if victim != "dvc" else []):
            process.kill()
    dvc.wait()


def is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return False


def wait_for_the_end_of_all_in(folder: Path, seconds: float = 60) -> None:
    """Wait for processes in a folder that outlived the killed DVC."""
    deadline = time.monotonic() + seconds
    while left := [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]:
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.05)
