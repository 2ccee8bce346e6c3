"""A search by Optuna: what is searched, and its trials as DVC experiments."""

import subprocess
import sys

import pytest
from project import ROOT, run

from sweeps import optuna_sweep
from sweeps.optuna_sweep import SPACE, choices, main, open_study, read_settings, suggest
from tinygpt.errors import UserError

SWEEP = "python -m sweeps.optuna_sweep"


@pytest.mark.parametrize(
    ("key", "value", "drawn"),
    [
        ("model.n_layer", "2..6", {str(n) for n in range(2, 7)}),
        ("train.lora.rank", "2..4", {"2", "3", "4"}),
        ("train.schedule", "cosine,constant", {"cosine", "constant"}),
        ("train.lr", "1..1.0000001", {"1"}),  # rounded to four digits
        ("train.betas", "[0.9, 0.95]", {"[0.9, 0.95]"}),
        ("download.source", "../texts", {"../texts"}),
        ("model.n_layer", "8", {"8"}),
    ],
)
def test_a_value_is_drawn_from_what_was_given(key, value, drawn, tmp_path):
    study = open_study(tmp_path / "study.db", "a", {key: value}, seed=1)
    assert {suggest(study.ask(), key, value) for _ in range(40 if len(drawn) > 1 else 2)} == drawn


def test_numbers_are_within_their_range_and_small_ones_are_drawn_on_a_logarithmic_scale(tmp_path):
    study = open_study(tmp_path / "study.db", "a", {}, seed=1)
    even = [float(suggest(study.ask(), "train.lr", "1e-4..1e-2")) for _ in range(40)]
    log = [float(suggest(study.ask(), "train.head_lr", "log:1e-4..1e-2")) for _ in range(40)]
    assert all(1e-4 <= value <= 1e-2 for value in even + log)
    assert {suggest(study.ask(), "train.weight_decay", "0..1") for _ in range(5)} - {"0", "1"}
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
        (["train.lr=1..2", "train.lr=1..3"], "-S train.lr is given 2 times: give it once"),
        (
            ["trian.lr=1..2", "train.warmup_step=1..2"],
            r"key trian.lr \(did you mean train.lr\?\)\n.*mean train.warmup_steps\?",
        ),
        (["train.lr=log:3e-3"], "-S train.lr=log:3e-3: must be log:LOW..HIGH"),
        (["train.lr=2..1"], "must be LOW..HIGH with LOW < HIGH"),
        (["train.lr=log:0..1"], "above 0 after log:"),
        (["train.max_steps=1e2..1e3"], "-S train.max_steps=1e2..1e3: it is a whole number, so write 100 and not 1e2"),
        (["train.lr=-1..1"], "-S train.lr=-1.0 must be"),
    ],
)
def test_settings_without_a_search_are_reported(texts, message):
    with pytest.raises(UserError, match=message):
        read_settings(texts)


def test_other_settings_are_refused_in_a_study_that_has_begun(tmp_path):
    open_study(tmp_path / "study.db", "a", {"train.lr": "1..2"}, seed=1)
    with pytest.raises(UserError, match=r"has trials with -S train.lr=1..2: use these, or another --name"):
        open_study(tmp_path / "study.db", "a", {"train.lr": "1..3"}, seed=1)
    open_study(tmp_path / "study.db", "b", {"train.lr": "1..3"}, seed=1)


def test_another_file_than_a_study_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("these are notes, not a database\n" * 100)
    with pytest.raises(UserError, match=r"notes.txt is not a study of Optuna \(.*not a database.*give another file"):
        open_study(tmp_path / "notes.txt", "a", {}, seed=1)


def test_a_trial_that_still_trains_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"train.lr": "1..2"}
    study = open_study(tmp_path / "study.db", "a", settings, seed=1)
    study.ask()
    with subprocess.Popen([sys.executable, "-c", "input()", "exp", "run", "a-0"], stdin=subprocess.PIPE) as process:
        with pytest.raises(UserError, match=rf"a-0 is still training \(process {process.pid}\): wait until it ends"):
            optuna_sweep.sweep(study, settings, 1)
        process.communicate(b"\n")
    assert len(study.trials) == 1


def test_an_experiment_that_dvc_has_not_kept_is_said(monkeypatch):
    monkeypatch.setattr(optuna_sweep.subprocess, "Popen", lambda *args: subprocess.CompletedProcess(args, 0))
    monkeypatch.setattr(subprocess.CompletedProcess, "wait", lambda process: 0, raising=False)
    with pytest.raises(UserError, match=r"DVC has not kept nothing-0 \(.*see docs/troubleshooting.md, Experiments"):
        optuna_sweep.run_experiment("nothing-0", [])


def test_a_sweep_has_a_trial(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["optuna_sweep", "--trials", "0"])
    with pytest.raises(SystemExit, match="--trials=0 must be 1 or more"):
        main()


def test_without_optuna_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install -r requirements-sweep.txt"):
        open_study(tmp_path / "study.db", "a", {}, seed=1)


def test_two_failures_in_a_row_stop_it_and_one_alone_does_not(tmp_path, monkeypatch, capsys):
    losses = iter([None, 3.0, None, 2.0, None, None])
    monkeypatch.setattr(optuna_sweep, "run_experiment", lambda name, values: next(losses))
    settings = {"train.lr": "1e-3..3e-2"}
    study = open_study(tmp_path / "study.db", "a", settings, seed=1)
    with pytest.raises(UserError, match=r"2 trials in a row failed, see above: run the sweep again to continue"):
        optuna_sweep.sweep(study, settings, 3)
    said = capsys.readouterr().out
    assert "a-1: val_loss 3.0000; lowest 3.0000, a-1\n" in said and "a-3: val_loss 2.0000; lowest 2.0000, a-3\n" in said


def test_a_second_sweep_of_a_study_is_refused(tmp_path):
    holder = "from filelock import FileLock; lock = FileLock('a.db.lock'); lock.acquire(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        said = run(f"{SWEEP} --study a.db", tmp_path, PYTHONPATH=str(ROOT))
        process.communicate(b"\n")
    assert (said.returncode, said.stdout.startswith("error: another sweep is writing a.db")) == (1, True)
