"""A story of experiments next to the folder: a queue, a sweep, and all of them side by side.

Each step follows the one before: run the file as a whole.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project import ROOT, commit, environment, run, succeed, wait_until
from test_pipeline import STAGES, ran

from sweeps.optuna_sweep import run_experiment
from tinygpt.files import read_json, sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.story]

SWEEP = "python -m sweeps.optuna_sweep --trials {} -S train.lr=log:1e-3..3e-2 -S train.max_steps=100"


@pytest.fixture(scope="module")
def project(done, tmp_path_factory) -> Path:
    """A project after its first run."""
    return Path(shutil.copytree(done, tmp_path_factory.mktemp("experiments") / "project", symlinks=True))


@pytest.fixture
def here(project, monkeypatch) -> Path:
    """The project, with this process in its folder and environment, as in a user's shell."""
    monkeypatch.chdir(project)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return project


def start(command: str, folder: Path, log: str) -> subprocess.Popen[bytes]:
    with open(folder.parent / log, "w") as file:
        return subprocess.Popen(
            command.split(), cwd=folder, env=environment(), stdout=file, stderr=file, start_new_session=True
        )


def experiments(folder: Path) -> set[str]:
    """The finished experiments, by DVC's references in git: asking DVC takes a second each time."""
    return {path.name for path in folder.glob(".git/refs/exps/??/*/*")}


def rows_of(said: str) -> dict[str, list[str]]:
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split() for line in said.splitlines()}


def test_without_experiments_compare_says_so(here, command):
    assert "no experiments of this commit yet" in command("compare").stdout


def test_a_queue_leaves_the_folder_alone(project):
    succeed("dvc exp run --queue train -S model.n_layer=2", project)
    assert succeed("git status --porcelain", project) == ""


def test_a_queued_experiment_has_no_metrics(here, command):
    rows = rows_of(command("compare").stdout)
    assert rows["experiment"][:4] == ["experiment", "state", "model.n_layer", "val_loss"]
    assert [row[1:4] for row in rows.values() if "Queued" in row] == [["Queued", "2", "-"]]


def test_the_python_of_the_page_shows_params_metrics_and_the_curve(project):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), re.DOTALL)
    (project.parent / "page.py").write_text(code)
    said = succeed(f"python {project.parent / 'page.py'}", project).splitlines()
    assert re.fullmatch(r"1 layers: \d\.\d+ bits per byte", said[0])
    assert said[1].startswith("workspace ") and said[-1].startswith("step,train_loss,val_loss")


def test_a_sweep_whose_trial_was_interrupted_continues_from_its_checkpoint(project):
    start("dvc queue start --jobs 1", project, "queue.log")  # continues in a process of its own
    sweep = start(SWEEP.format(1), project, "sweep.log")
    log = project.parent / "sweep.log"
    wait_until(lambda: "train loss" in log.read_text(), log)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    assert sweep.wait(timeout=60) == 130
    (first,) = [line for line in log.read_text().splitlines() if line.startswith("sweep-0: ")]
    said = succeed(SWEEP.format(2), project)
    assert f"sweep-1: {first.removeprefix('sweep-0: ')}\n" in said
    assert "continuing after step" in said
    assert "sweep-2: train.lr=" in said and "has the lowest val_loss of 2" in said
    assert succeed("git status --porcelain", project) == ""


def test_queued_experiments_are_done(project):
    wait_until(lambda: len(experiments(project)) >= 3, project.parent / "queue.log", seconds=240)  # two of the sweep
    deadline = time.monotonic() + 120
    while (status := succeed("dvc queue status", project)).count("Success") < 1:
        assert "Failed" not in status, succeed("cat .dvc/tmp/exps/run/*/*.out", project)
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert succeed("git status --porcelain", project) == ""
    assert len(list(project.glob("runs/*/lock"))) == 4  # of all experiments, in one folder


def test_experiments_are_compared_and_drawn(here, command):
    said = command("compare", "--plot", "curves.svg").stdout
    rows = rows_of(said)
    first = read_json(here / "reports/train.json", stage="train")["val_loss"]
    columns = rows["experiment"]
    shown = {name: dict(zip(columns, row, strict=True)) for name, row in rows.items() if len(row) == len(columns)}
    assert set(columns[:5]) == {"experiment", "model.n_layer", "train.max_steps", "train.lr", "val_loss"}
    for name in ("workspace", "main"):
        assert [shown[name][key] for key in ("train.lr", "train.max_steps")] == ["0.008", "40"]
        assert shown[name]["val_loss"] == f"{first:.4f}"
    assert sorted(row["model.n_layer"] for row in shown.values()) == ["1", "1", "1", "1", "2", "model.n_layer"]
    loss = float(shown["sweep-1"]["val_loss"])
    assert shown["sweep-1"]["train.max_steps"] == "100" and loss < first
    assert "curves.svg shows 4 of 5; equal ones are shown once" in said  # the workspace equals the commit
    svg = (here / "curves.svg").read_text()
    (drawn,) = re.findall(r"sweep-1: (\d\.\d{3})\b", svg)
    assert float(drawn) == pytest.approx(loss, abs=6e-4) and f"main: {first:.3f}" in svg
    named = command("compare", "sweep-1", "workspace").stdout.splitlines()
    assert [line.split()[0] for line in named] == ["experiment", "sweep-1", "workspace"]
    assert f"{loss:.4f}" in named[1].split()
    (here / "curves.svg").unlink()


def test_a_mistake_is_one_line(here, command):
    for options, message in {
        "nowhere": "error: DVC finds no nowhere here (unknown Git revision 'nowhere'): see `git log` and `dvc exp",
        "--page notes.txt": "error: --page notes.txt: the name must end in .html",
        "--plot curves.jpg": "error: --plot curves.jpg: the name must end in .svg or .png",
    }.items():
        said = command("compare", *options.split())
        assert said.returncode == 1
        assert said.stderr.startswith(message) and len(said.stderr.splitlines()) == 1


def test_a_trial_that_fails_has_no_loss(here, capfd):
    assert run_experiment("bad", ["train.lr=-1"]) is None
    assert "train.lr=-1 must be above 0" in "".join(capfd.readouterr())


def test_nothing_is_left_to_do_and_the_best_is_applied(here, project, command):
    rows = rows_of(command("compare").stdout)
    column = rows["experiment"].index("val_loss")
    losses = {name: float(row[column]) for name, row in rows.items() if re.fullmatch(r"sweep-\d", name)}
    assert sorted(losses) == ["sweep-1", "sweep-2"]
    best = min(losses, key=losses.__getitem__)
    said = succeed(SWEEP.format(2), project)
    assert f"{best} has the lowest val_loss of 2: `dvc exp apply {best}`" in said and "Running stage" not in said
    said = run(f"{SWEEP.format(2)} --study other.db", project).stdout
    assert re.search(r"error: sweep-\d is an experiment of another study: give another --name", said)
    succeed(f"dvc exp apply {best}", project)
    assert f"{read_json(project / 'reports/train.json', stage='train')['val_loss']:.4f}" == f"{losses[best]:.4f}"


def test_a_worktree_without_an_identity_runs_experiments(project):
    other = project.parent / "other"
    succeed(f"git worktree add -q {other}", project)
    home = str(project.parent)
    assert ran(succeed("dvc exp run clean -S clean.split_seed=1", other, HOME=home)) == STAGES[:2]
    assert (other / "data/clean/train.jsonl").exists()


# ---- a base, which is an input like raw text ----


def weights(folder: Path) -> str:
    return sha256_file(folder / "data/base/model.safetensors")


def test_a_base_travels_with_experiments(here, command):
    assert (here / "data/base/README.md").exists()
    assert "`python -m tinygpt preset base`" in command("promote", "--to", here / "data/base").stdout
    assert "data/base" in run("git diff HEAD -- dvc.lock", here).stdout
    assert weights(here) == sha256_file(here / "data/model/model.safetensors")
    assert command("preset", "base").returncode == 0
    said = succeed("dvc exp run --temp train -S train.max_steps=6 -S train.warmup_steps=1 -S train.lr=5", here)
    assert "at step 0: no step improved it, so the weights that training started from are published" in said
    assert "Stage 'base' didn't change" in said


def test_another_base_than_the_recorded_one_is_refused_and_the_recorded_one_comes_back(here):
    before, lock, path = weights(here), (here / "dvc.lock").read_bytes(), here / "data/base/model.safetensors"
    damaged = path.read_bytes()[:-4] + b"\0\0\1\0"
    path.unlink()
    path.write_bytes(damaged)
    said = run("dvc repro base", here)
    assert (
        said.returncode and "error: data/base is not the base in dvc.lock: `dvc checkout -f data/base`" in said.stdout
    )
    assert (here / "dvc.lock").read_bytes() == lock and path.read_bytes() == damaged
    succeed("dvc checkout -f data/base", here)
    assert weights(here) == before
    succeed("dvc repro -f base", here)


def test_a_base_comes_back_to_its_folder_and_to_a_clone(here):
    before = weights(here)
    shutil.rmtree(here / "data")
    said = succeed("dvc repro train_tokenizer", here)
    assert ran(said) == [] and "Running stage 'base'" in said  # it restores the base from the cache
    assert weights(here) == before
    succeed("dvc repro -f base", here)
    assert weights(here) == before
    succeed("dvc remote add -d store ../store && dvc push base", here)
    commit(here, "a base")
    clone = here.parent / "clone"
    succeed(f"git clone -q {here} {clone} && cd {clone} && dvc pull base", here)
    assert weights(clone) == before
    shutil.rmtree(clone / "data")
    shutil.rmtree(clone / ".dvc/cache")
    shutil.move(here.parent / "store", here.parent / "away")
    said = run("dvc repro base", clone).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: data/base is missing, and DVC cannot fetch the one in dvc.lock (")
    assert "Traceback" not in said
