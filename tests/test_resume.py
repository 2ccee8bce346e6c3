"""Training continues however it was killed, and ends with the same bytes."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import STEPS
from filelock import FileLock
from project import (
    commit,
    environment,
    hashes,
    newest_step,
    run,
    run_stages,
    set_params,
    start_trainer,
    status_of,
    succeed,
    wait_until,
)
from test_code import forget

from tinygpt import code
from tinygpt.errors import Stopped
from tinygpt.run.processes import Interrupts

pytestmark = pytest.mark.slow

LAST = STEPS["train.max_steps"]
LIKE_DVC = """
import os, subprocess, sys
command = ["sh", "-c", sys.executable + " -m stages.train; exit $?"]
subprocess.run(command, env=os.environ | {"DVC_STAGE": "train"})
"""


@pytest.fixture
def trained(undisturbed, tmp_path) -> Path:
    """A copy of the trained project."""
    return Path(shutil.copytree(undisturbed, tmp_path / "project", symlinks=True))


@pytest.fixture
def project(trained) -> Path:
    """The same project before training."""
    shutil.rmtree(trained / "runs")
    shutil.rmtree(trained / "data/model")
    for path in trained.glob("reports/train*"):
        path.unlink()
    return trained


def is_saving(folder: Path) -> bool:
    return any(folder.glob("runs/*/*.partial"))


def log(folder: Path) -> str:
    return (folder / "train.log").read_text()


def test_killed_at_any_moment_training_ends_with_the_same_bytes(project, undisturbed):
    for step, moment in [(14, lambda folder: True), (40, is_saving)]:
        process = start_trainer(project)
        wait_until(lambda step=step: newest_step(project) >= step, project)
        wait_until(lambda moment=moment: moment(project), project, pause=0.001)
        process.kill()
        assert status_of(process) == -signal.SIGKILL
        assert not (project / "data/model").exists()
    assert "continuing after step" in run_stages("train", project)
    assert hashes(project) == hashes(undisturbed)
    assert not is_saving(project)  # leftovers of the killed trainer are removed


def test_asked_to_stop_training_saves_and_ends_with_a_status(project, undisturbed, command, monkeypatch):
    monkeypatch.chdir(project)
    for number, step in [(signal.SIGINT, 14), (signal.SIGTERM, 40)]:
        process = start_trainer(project)
        wait_until(lambda step=step: newest_step(project) >= step, project)
        os.kill(process.pid, number)
        assert status_of(process) == 128 + number
        assert f"stopped after step {newest_step(project)};" in log(project)
    listed = command("runs").stdout.split()
    assert "interrupted" in listed and "finished" not in listed
    assert f"continuing after step {newest_step(project)} of {LAST}" in run_stages("train", project)
    assert f"finished {LAST} of {LAST} steps" in " ".join(command("runs").stdout.split())
    assert hashes(project) == hashes(undisturbed)


def test_the_death_of_its_dvc_stops_training_whatever_is_between_them(project):
    with open(project / "train.log", "w") as output:
        dvc = subprocess.Popen(
            [sys.executable, "-c", LIKE_DVC], cwd=project, env=environment(), stdout=output, stderr=output
        )
    wait_until(lambda: any(project.glob("runs/*/lock")), project)  # before the first step
    dvc.kill()
    dvc.wait()
    wait_until(lambda: "train: stopped after step" in log(project), project)
    assert 0 < newest_step(project) < LAST


def test_killing_dvc_stops_the_trainer_and_every_way_to_run_continues(done, undisturbed, tmp_path):
    project = Path(shutil.copytree(done, tmp_path / "project", symlinks=True))
    set_params(project, STEPS)
    commit(project, "longer")
    succeed("git config user.name t && git config user.email t@t", project)  # to run experiments in an edited folder

    for command in ("dvc exp run train", "dvc exp run --temp train", "dvc repro train"):
        before = newest_step(project)
        with open(project / "train.log", "w") as output:
            dvc = subprocess.Popen(command.split(), cwd=project, env=environment(), stdout=output, stderr=output)
        while newest_step(project) <= max(before, 40):  # 40: the steps of the first run, still there
            assert dvc.poll() is None, log(project)
            time.sleep(0.005)
        dvc.kill()
        dvc.wait()
        for lock in project.glob("runs/*/lock"):
            with FileLock(lock, timeout=60):  # once it is free, the trainer has ended
                pass
        assert before < newest_step(project) < LAST
        if command == "dvc exp run train":  # it leaves a detached HEAD; this repairs it
            assert run("git symbolic-ref -q HEAD", project).returncode == 1
            succeed("git switch -q main", project)
    reached = newest_step(project)
    assert f"continuing after step {reached} of {LAST}" in run_stages("train", project)
    assert hashes(project) == hashes(undisturbed)


def test_what_a_person_started_outlives_its_parent(project):
    set_params(project, {"train.max_steps": 20})
    succeed(f"nohup {sys.executable} -m stages.train >train.log 2>&1 &", project)
    wait_until(lambda: "train: lowest validation loss" in log(project), project)  # its last words
    assert (project / "reports/train.json").exists()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_fills_up_in_a_save_is_one_line_and_the_run_continues_afterwards(project, undisturbed):
    process = start_trainer(project)
    wait_until(lambda: newest_step(project) >= 14, project)
    # A limit on file size stands for a full disk: write() fails there.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert status_of(process) == 1
    assert [line for line in log(project).splitlines() if line.startswith("error: no room to write runs/")]
    assert "Traceback" not in log(project)
    assert not is_saving(project)
    assert f"continuing after step {newest_step(project)} of {LAST}" in run_stages("train", project)
    assert hashes(project) == hashes(undisturbed)


def test_a_finished_run_is_published_again_with_the_time_and_memory_of_its_training(trained, undisturbed):
    shutil.rmtree(trained / "data/model")
    output = run_stages("train", trained)
    assert f"continuing after step {LAST} of {LAST}" in output
    assert f"to train afresh, rm -r {trained}/runs/" in output
    assert "tokens/s" not in output
    assert hashes(trained) == hashes(undisturbed)
    report, first = (json.loads((folder / "reports/train.json").read_text()) for folder in (trained, undisturbed))
    assert report == first


def test_another_model_never_continues_from_these_checkpoints(trained):
    set_params(trained, {"model.n_layer": 2, "train.max_steps": 10})
    assert "continuing" not in run_stages("train", trained)
    assert len({path.parent for path in trained.glob("runs/*/step-*")}) == 3  # the first project's, too


def test_an_interrupted_run_continues_after_a_change_of_code_that_decides_no_weight(project, monkeypatch):
    monkeypatch.setattr(code, "ROOT", project)
    set_params(project, {"train.max_steps": 20, "train.save_every": 100})
    asked = itertools.cycle([0, 0, 0, 0, signal.SIGTERM])
    monkeypatch.setattr(Interrupts, "requested", lambda interrupts: next(asked))

    def stopped_after(*changed: str) -> int:
        """The last step of a training that continues for five steps after a change of these files."""
        for name in changed:
            path = project / "tinygpt" / name
            path.write_text(path.read_text() + "\nCHANGED = True\n")
        forget()
        with pytest.raises(Stopped) as stopped:
            run_stages("train", project)
        return int(re.search(r"after step (\d+)", str(stopped.value))[1])

    try:
        assert stopped_after() == 5
        assert stopped_after("run/loggers.py", "run/processes.py", "report/training.py") == 10
        assert stopped_after("train/loss.py") == 5
    finally:
        monkeypatch.undo()
        forget()
