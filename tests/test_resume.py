"""Training killed in every way goes on and ends with the same bytes."""

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import environment, make_project, run, set_params, succeed

TRAIN = [sys.executable, "-m", "stages.train"]
RESULTS = ("data/model/model.safetensors", "data/model/last.safetensors", "data/model/config.json")
REPORTS = ("reports/train.csv", "reports/train_samples.md")
STEPS = {"train.max_steps": 300, "train.save_every": 7, "train.eval_every": 50}  # a few seconds of training


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RESULTS + REPORTS}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """A project trained in one go."""
    folder = make_project(tmp_path_factory.mktemp("undisturbed") / "project")
    set_params(folder, STEPS)
    for stage in ("download", "clean", "train_tokenizer", "encode", "train"):
        succeed(f"python -m stages.{stage}", folder)
    return folder


@pytest.fixture
def project(undisturbed, tmp_path) -> Path:
    """The same project before training."""
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder)
    for name in ("runs", "data/model"):
        shutil.rmtree(folder / name)
    for name in REPORTS:
        (folder / name).unlink()
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(TRAIN, cwd=folder, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint of at least `step` steps is there."""
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:12]) >= step for path in folder.glob("runs/*/step-*") if path.suffix != ".partial"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_partial(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint is being written."""
    while not any(folder.glob("runs/*/*.partial")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(project, undisturbed):
    for step in (14, 70, 150):
        process = start(project)
        wait_for_step(project, step, process)
        if step == 70:
            wait_for_partial(project, process)  # in the middle of a save
        process.kill()
        process.communicate()
        assert not (project / "data/model").exists()
    assert "going on after step" in succeed("python -m stages.train", project)
    assert hashes(project) == hashes(undisturbed)
    assert not list(project.glob("runs/*/*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves_with_a_status(project, undisturbed, number):
    process = start(project)
    wait_for_step(project, 14, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    stopped = int(output.split("stopped after step ")[1].split(";")[0])
    assert (next(project.glob("runs/*")) / f"step-{stopped:07d}").exists()
    assert f"going on after step {stopped} of 300" in succeed("python -m stages.train", project)
    assert hashes(project) == hashes(undisturbed)


def test_a_finished_run_is_published_again_without_training(undisturbed, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "data/model")
    output = succeed("python -m stages.train", folder)
    assert "going on after step 300 of 300" in output
    assert "tokens/s" not in output
    assert hashes(folder) == hashes(undisturbed)


def test_another_model_never_goes_on_from_this_ones_checkpoints(undisturbed, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder)
    set_params(folder, {"model.n_layer": 2, "train.max_steps": 10, "train.warmup_steps": 2})
    assert "going on" not in succeed("python -m stages.train", folder)
    assert len(list(folder.glob("runs/*"))) == 2


def test_a_second_trainer_of_the_same_run_is_refused_in_one_line(project):
    first = start(project)
    wait_for_step(project, 7, first)
    second = run("python -m stages.train", project)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert "error: another trainer is writing runs/" in second.stdout
    assert "Traceback" not in second.stdout


def test_a_disk_that_fills_up_in_a_save_is_one_line_and_the_run_goes_on_afterwards(project, undisturbed):
    process = start(project)
    wait_for_step(project, 14, process)
    process.kill()
    process.communicate()

    def limit() -> None:  # a limit on the size of files stands for the end of the disk: write() fails there
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    full = subprocess.run(TRAIN, cwd=project, env=environment(), capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in full.stderr
    assert not list(project.glob("runs/*/*.partial"))
    assert "going on after step" in succeed("python -m stages.train", project)
    assert hashes(project) == hashes(undisturbed)


def test_the_death_of_its_parent_alone_does_not_stop_a_trainer_that_a_person_started(project):
    command = f"cd {project} && nohup {sys.executable} -m stages.train >train.log 2>&1 & echo $!"
    pid = int(succeed(command, project))
    deadline = time.monotonic() + 120
    while not (project / "data/model").exists():
        assert time.monotonic() < deadline, (project / "train.log").read_text()
        time.sleep(0.1)
    assert pid
    assert (project / "reports/train.csv").exists()
