"""A search by Optuna: what is searched, and trials that are DVC's experiments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import ROOT, environment, run, succeed
from test_pipeline import done, project  # noqa: F401  a project after `dvc repro`

from sweeps.optuna_sweep import SPACE, choices, open_study, read_settings, suggest
from tinygpt.errors import UserError
from tinygpt.files import read_json

SWEEP = "python -m sweeps.optuna_sweep"


@pytest.mark.parametrize(
    ("value", "drawn"),
    [
        ("2..6", {str(n) for n in range(2, 7)}),
        ("cosine,constant", {"cosine", "constant"}),
        ("1..1.0000001", {"1"}),  # four digits
        ("[0.9, 0.95]", {"[0.9, 0.95]"}),
        ("../texts", {"../texts"}),
        ("8", {"8"}),
    ],
)
def test_a_value_is_drawn_from_what_was_given(value, drawn, tmp_path):
    study = open_study(tmp_path / "study.db", "a", {"key": value}, seed=1)
    assert {suggest(study.ask(), "key", value) for _ in range(40 if len(drawn) > 1 else 2)} == drawn


def test_numbers_are_within_their_range_and_small_ones_are_drawn_on_a_logarithmic_scale(tmp_path):
    study = open_study(tmp_path / "study.db", "a", {}, seed=1)
    even = [float(suggest(study.ask(), "even", "1e-4..1e-2")) for _ in range(40)]
    log = [float(suggest(study.ask(), "log", "log:1e-4..1e-2")) for _ in range(40)]
    assert all(1e-4 <= value <= 1e-2 for value in even + log)
    assert sum(value < 1e-3 for value in even) < 12 < sum(value < 1e-3 for value in log)


def test_settings_are_keys_with_values_of_which_one_is_searched():
    settings = {"model.n_layer": "1..2", "clean.separator": "x=y", "train.lora.rank": "8"}
    assert read_settings([f"{key}={value}" for key, value in settings.items()]) == settings
    assert len(read_settings(SPACE)) == len(SPACE)
    assert choices("a,b") == ["a", "b"] and choices("{a: 1, b: 2}") == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.lr"], "-S train.lr: must be KEY=VALUE"),
        (["train.lr=3e-3"], "nothing to search"),
        (
            ["trian.lr=1..2", "train.warmup_step=1..2"],
            r"key trian \(did you mean train\?\)\n.*mean train.warmup_steps\?",
        ),
        (["train.lr=log:3e-3"], "-S train.lr=log:3e-3: must be log:LOW..HIGH"),
        (["train.lr=2..1"], "must be LOW..HIGH with LOW < HIGH"),
        (["train.lr=log:0..1"], "above 0 after log:"),
    ],
)
def test_settings_that_make_no_search_are_told(texts, message):
    with pytest.raises(UserError, match=message):
        read_settings(texts)


def test_other_settings_are_refused_in_a_study_that_has_begun(tmp_path):
    open_study(tmp_path / "study.db", "a", {"train.lr": "1..2"}, seed=1)
    with pytest.raises(UserError, match=r"has trials of -S train.lr=1..2: give these, or another --name"):
        open_study(tmp_path / "study.db", "a", {"train.lr": "1..3"}, seed=1)
    open_study(tmp_path / "study.db", "b", {"train.lr": "1..3"}, seed=1)


def test_without_optuna_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install -r requirements-sweep.txt"):
        open_study(tmp_path / "study.db", "a", {}, seed=1)


@pytest.mark.slow
def test_trials_are_experiments_and_the_sweep_goes_on_where_it_was(project):  # noqa: F811
    sweep = f"{SWEEP} -S train.lr=log:1e-3..3e-2 -S train.max_steps=12"
    assert "sweep-0 has the lowest val_loss of 1" in succeed(f"{sweep} --trials 1", project)
    said = succeed(f"{sweep} --trials 2", project)
    assert "sweep-0:" not in said and "sweep-1: train.lr=" in said
    rows = [line.split() for line in succeed("python -m tinygpt compare", project).splitlines()]
    losses = {name: float(row[2]) for name, *row in rows if name.startswith("sweep-")}
    assert sorted(losses) == ["sweep-0", "sweep-1"]
    best = min(losses, key=losses.__getitem__)
    assert f"{best} has the lowest val_loss of 2: `dvc exp apply {best}`" in said
    assert "Running stage" not in succeed(f"{sweep} --trials 2", project)  # nothing is left to do
    assert succeed("git status --porcelain", project) == ""
    succeed(f"dvc exp apply {best}", project)
    assert f"{read_json(project / 'reports/train.json', stage='train')['val_loss']:.4f}" == f"{losses[best]:.4f}"


@pytest.mark.slow
def test_a_trial_that_was_interrupted_goes_on_from_its_checkpoint(project):  # noqa: F811
    sweep = f"{SWEEP} --trials 1 -S train.lr=1e-3..3e-2 -S train.max_steps=400 -S train.eval_every=100"
    process = start(sweep, project)
    before = time.monotonic()
    while "train loss" not in (project / "sweep.log").read_text():
        assert time.monotonic() < before + 120, (project / "sweep.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(timeout=60) == 130
    (first,) = [line for line in (project / "sweep.log").read_text().splitlines() if line.startswith("sweep-0: ")]
    said = succeed(sweep, project)
    assert f"sweep-1: {first.removeprefix('sweep-0: ')}\n" in said
    assert "going on after step" in said


@pytest.mark.slow
def test_two_failures_in_a_row_stop_it(project):  # noqa: F811
    said = run(f"{SWEEP} -S train.lr=-2..-1", project)
    assert said.returncode == 1
    assert "must be within (0, inf)" in said.stdout
    assert said.stdout.endswith("error: 2 trials in a row failed, as told above: the sweep goes on when run again\n")


def start(command: str, folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / "sweep.log", "w") as log:
        return subprocess.Popen(
            command.split(), cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )


def test_a_second_sweep_of_a_study_is_refused(tmp_path):
    holder = "from filelock import FileLock; lock = FileLock('a.db.lock'); lock.acquire(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        said = run(f"{SWEEP} --study a.db", tmp_path, PYTHONPATH=str(ROOT))
        process.communicate(b"\n")
    assert (said.returncode, said.stdout.startswith("error: another sweep is writing a.db")) == (1, True)
