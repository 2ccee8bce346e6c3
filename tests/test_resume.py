"""Training killed in every way goes on and ends with the same bytes."""

import hashlib
import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
from project import (
    made_once,
    make_project,
    newest_step,
    run,
    run_stages,
    set_params,
    start_trainer,
    succeed,
    wait_until,
)

pytestmark = pytest.mark.slow

MODEL = ("data/model/model.safetensors", "data/model/last.safetensors", "data/model/config.json")
REPORTS = ("reports/train.csv", "reports/train_norms.csv", "reports/train_samples.md")
STEPS = {"train.max_steps": 300, "train.save_every": 7, "train.eval_every": 60}  # some seconds of training
LIKE_DVC = """
import os, subprocess, sys
command = ["sh", "-c", sys.executable + " -m stages.train; exit $?"]
subprocess.run(command, env=os.environ | {"DVC_STAGE": "train"})
"""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all that a training makes, less the report, which tells the time it took."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MODEL + REPORTS}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """A project trained in one go."""

    def make(folder: Path) -> None:
        make_project(folder)
        set_params(folder, STEPS)
        run_stages("download clean train_tokenizer encode train", folder)

    return made_once(tmp_path_factory.getbasetemp(), "undisturbed", make)


@pytest.fixture
def trained(undisturbed, tmp_path) -> Path:
    """A copy of the trained project."""
    shutil.copytree(undisturbed, tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def project(trained) -> Path:
    """The same project before training."""
    for name in ("runs", "data/model"):
        shutil.rmtree(trained / name)
    for name in (*REPORTS, "reports/train.json"):
        (trained / name).unlink()
    return trained


def is_saving(folder: Path) -> bool:
    return any(folder.glob("runs/*/*.partial"))


def log(folder: Path) -> str:
    return (folder / "train.log").read_text()


def test_killed_at_any_moment_it_ends_with_the_same_bytes(project, undisturbed):
    for step, moment in [(14, lambda folder: True), (60, is_saving)]:
        process = start_trainer(project)
        wait_until(lambda step=step: newest_step(project) >= step, project)
        wait_until(lambda moment=moment: moment(project), project)
        process.kill()
        process.wait()
        assert not (project / "data/model").exists()
    assert "going on after step" in succeed("python -m stages.train", project)
    assert hashes(project) == hashes(undisturbed)
    assert not is_saving(project)  # what a killed trainer left is cleared away


def test_asked_to_stop_it_saves_and_leaves_with_a_status(project, undisturbed, command, monkeypatch):
    monkeypatch.chdir(project)
    for number, step in [(signal.SIGINT, 14), (signal.SIGTERM, 60)]:
        process = start_trainer(project)
        wait_until(lambda step=step: newest_step(project) >= step, project)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert f"stopped after step {newest_step(project)};" in log(project)
    listed = command("runs").stdout.split()
    assert "interrupted" in listed and "finished" not in listed
    assert f"going on after step {newest_step(project)} of 300" in succeed("python -m stages.train", project)
    assert "finished 300 of 300 steps" in " ".join(command("runs").stdout.split())
    assert hashes(project) == hashes(undisturbed)


def test_the_death_of_the_dvc_above_it_stops_it_whatever_stands_between(project):
    for ready in (lambda: any(project.glob("runs/*/lock")), lambda: newest_step(project) > 1):
        dvc = start_trainer(project, [sys.executable, "-c", LIKE_DVC])
        wait_until(ready, project)
        dvc.kill()
        dvc.wait()
        wait_until(lambda: "train: stopped after step" in log(project), project)
    assert 1 < newest_step(project) < 300


def test_what_a_person_started_outlives_its_parent(project):
    succeed(f"nohup {sys.executable} -m stages.train >train.log 2>&1 &", project)
    wait_until(lambda: "train: lowest validation loss" in log(project), project)  # its last words
    assert (project / "reports/train.json").exists()


def test_a_damaged_checkpoint_makes_way_for_the_one_before(trained, undisturbed):
    (newest,) = trained.glob("runs/*/step-0000300")
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.truncate(1000)
    shutil.rmtree(trained / "data/model")
    output = succeed("python -m stages.train", trained)
    assert "step-0000300 is damaged (optimizer.safetensors is not what was written): taking the one before" in output
    assert "going on after step 294 of 300" in output
    assert hashes(trained) == hashes(undisturbed)


def test_a_finished_run_is_published_again_without_training(trained, undisturbed):
    shutil.rmtree(trained / "data/model")
    output = succeed("python -m stages.train", trained)
    assert "going on after step 300 of 300" in output
    assert "tokens/s" not in output
    assert hashes(trained) == hashes(undisturbed)
    report, first = (json.loads((folder / "reports/train.json").read_text()) for folder in (trained, undisturbed))
    assert report == first  # time and memory are those of the training, too


def test_another_model_never_goes_on_from_this_ones_checkpoints(trained):
    set_params(trained, {"model.n_layer": 2, "train.max_steps": 10})
    assert "going on" not in succeed("python -m stages.train", trained)
    assert len({path.parent for path in trained.glob("runs/*/step-*")}) == 2


def test_a_second_trainer_of_the_same_run_is_refused_in_one_line(project):
    first = start_trainer(project)
    wait_until(lambda: newest_step(project), project)
    first.send_signal(signal.SIGSTOP)  # else it may end before the second is there
    second = run("python -m stages.train", project)
    first.kill()
    first.wait()
    assert second.returncode == 1
    assert second.stdout.startswith("error: another trainer is writing runs/")
    assert len(second.stdout.splitlines()) == 1


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_fills_up_in_a_save_is_one_line_and_the_run_goes_on_afterwards(project, undisturbed):
    process = start_trainer(project)
    wait_until(lambda: newest_step(project) >= 14, project)
    # A limit on the size of files stands for the end of the disk: write() fails there.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert process.wait(timeout=60) == 1
    assert [line for line in log(project).splitlines() if line.startswith("error: no room to write runs/")]
    assert "Traceback" not in log(project)
    assert not is_saving(project)
    assert f"going on after step {newest_step(project)} of 300" in succeed("python -m stages.train", project)
    assert hashes(project) == hashes(undisturbed)
