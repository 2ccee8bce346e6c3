"""A run can be watched while it trains: its curve, its samples, and texts by its newest checkpoint."""

import csv
import dataclasses
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import RUNTIME, STEPS
from filelock import FileLock
from project import newest_step, set_params, start_trainer, status_of, wait_until
from test_page import in_chromium, opened
from test_playground import browser  # noqa: F401  a fixture
from test_train import PARAMS, train

from tinygpt.errors import UserError
from tinygpt.progress import shortened
from tinygpt.report.page import write_live
from tinygpt.report.training import write_curve
from tinygpt.run.folder import keep_name, name_of, read_name
from tinygpt.train.trainer import Trainer, TrainState

SEEN = ("train.csv", "train_norms.csv", "train_samples.md")


@pytest.fixture(scope="module")
def stopped(done, tmp_path_factory) -> Path:
    """A project whose training was interrupted after its second evaluation, with the log so far."""
    folder = tmp_path_factory.mktemp("live") / "project"
    shutil.copytree(done, folder, symlinks=True)
    shutil.rmtree(folder / "runs")
    set_params(folder, {**STEPS, "train.max_steps": 5000, "runtime.log_every": 30})
    for name in SEEN:
        (folder / "reports" / name).unlink()  # as DVC does before it runs the stage
    trainer = start_trainer(folder)
    wait_until(lambda: len(evaluated_steps(folder / "reports")) >= 2, folder)
    os.kill(trainer.pid, signal.SIGINT)
    assert status_of(trainer) == 130
    return folder


def evaluated_steps(folder: Path) -> list[int]:
    """The steps of the curve that have a validation loss; any file that is there is whole."""
    if not (folder / "train.csv").exists():
        return []
    text = (folder / "train.csv").read_text()
    assert text.endswith("\n")
    return [int(row["step"]) for row in csv.DictReader(text.splitlines()) if row["val_loss"]]


def test_the_curve_and_the_samples_of_each_evaluation_are_there_before_the_end_and_after_ctrl_c(stopped):
    steps = evaluated_steps(stopped / "reports")
    assert steps[:2] in ([60, 120], [0, 60])
    (run,) = (stopped / "runs").iterdir()
    for name in SEEN:
        assert (stopped / "reports" / name).read_bytes() == (run / name).read_bytes()
    written = re.findall(r"## Step (\d+)", (run / "train_samples.md").read_text())
    assert [int(step) for step in written] == steps
    assert len((run / "train_norms.csv").read_text().splitlines()) in (len(steps), len(steps) + 1)


def test_the_log_has_one_kind_of_line_that_fits_and_a_sample_at_each_evaluation(stopped):
    log = (stopped / "train.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("step ")]
    assert " elapsed, " not in log
    assert all(len(line) <= 80 for line in lines)
    assert all(re.search(r"  \d+:\d\d(:\d\d)? left$", line) for line in lines[2:])
    at = log.splitlines().index(next(line for line in lines if "val loss" in line))
    note, sample = log.splitlines()[at + 1 : at + 3]
    assert note == "before the first step, it writes:" and sample.startswith("    ")
    assert log.count(note) == 1


def test_the_newest_checkpoint_writes_a_text(stopped, command, monkeypatch):
    monkeypatch.chdir(stopped)
    (run,) = (stopped / "runs").iterdir()
    said = command("generate", "--run", "newest", "--prompt", "The", "--max-new-tokens", 5, "--seed", 1)
    assert said.returncode == 0 and said.stdout.startswith("The")
    assert command("generate", "--run", run.name[:6], "--prompt", "The", "--max-new-tokens", 5, "--seed", 1) == said
    other = command("generate", "--prompt", "The", "--max-new-tokens", 5, "--seed", 1)
    assert other.stdout.startswith("The")
    refused = command("generate", "--run", "xyz", "--prompt", "The").stderr
    assert refused == f"error: no run has a name that begins with xyz: choose one of {run.name}\n"
    assert "give one of them" in command("generate", "--run", "newest", "--model", "data/model").stderr
    weights, newest = run / "model/model.safetensors", run / f"step-{newest_step(stopped):07d}/weights.safetensors"
    assert weights.stat().st_ino == newest.stat().st_ino  # one file, not two copies


def test_a_run_is_called_by_the_params_that_differ_or_by_its_experiment(stopped, command, monkeypatch, tmp_path):
    monkeypatch.chdir(stopped)
    (run,) = (stopped / "runs").iterdir()
    name = read_name(run)
    assert name.startswith("max_steps=5000_eval_every=60_") and len(name) <= 60
    assert command("runs").stdout.splitlines()[1].split()[-1] == name
    monkeypatch.setenv("DVC_EXP_NAME", "tulip-bird/../..")
    assert name_of(stopped) == "tulip-bird_.._"[:-4]
    monkeypatch.delenv("DVC_EXP_NAME")
    assert name_of(tmp_path) == ""  # no commit, no params
    keep_name(run, "another")
    assert read_name(run) == name


def test_a_second_terminal_sees_each_evaluation_and_makes_a_page(stopped, command, monkeypatch):
    monkeypatch.chdir(stopped)
    (run,) = (stopped / "runs").iterdir()
    lines = command("watch").stdout.splitlines()
    assert lines[0] == f"watching runs/{run.name}; reports/live.html shows it in a browser"
    assert [int(line.split()[1].replace(",", "")) for line in lines if line.startswith("step ")] == evaluated_steps(run)
    assert any(line.startswith("    ") for line in lines)
    assert lines[-1].startswith(f"no training is running in runs/{run.name} any more (")
    assert 'http-equiv="refresh"' not in (stopped / "reports/live.html").read_text()
    assert (
        command("watch", "nothing").stderr
        == f"error: no run has a name that begins with nothing: choose one of {run.name}\n"
    )


def test_a_run_is_watched_from_before_its_first_evaluation(stopped, command, monkeypatch):
    monkeypatch.chdir(stopped)
    monkeypatch.setattr("tinygpt.cli.runs.EVERY_S", 0.01)
    (old,) = (stopped / "runs").iterdir()
    new = stopped / "runs" / ("0" * 16)
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("train.csv"))
    (new / "run.json").touch()  # it has begun later
    held = FileLock(new / "lock", thread_local=False)
    held.acquire()

    def evaluate() -> None:
        shutil.copy(old / "train.csv", new)
        held.release()

    waiter = threading.Timer(0.5, evaluate)
    waiter.start()
    try:
        lines = command("watch").stdout.splitlines()
    finally:
        waiter.join()
        shutil.rmtree(new)
    assert lines[0].startswith(f"watching runs/{new.name};") and any(line.startswith("step ") for line in lines)


def test_of_several_trainings_one_must_be_chosen(stopped, command, monkeypatch):
    monkeypatch.chdir(stopped)
    names = ["1" * 16, "2" * 16]
    for name in names:
        shutil.copytree(next((stopped / "runs").glob("[!12]*")), stopped / "runs" / name)
    try:
        with FileLock(stopped / "runs" / names[0] / "lock"), FileLock(stopped / "runs" / names[1] / "lock"):
            said = command("watch").stderr
            monkeypatch.setattr("tinygpt.cli.runs.is_locked", lambda folder: next(answers, False))
            answers = iter([True, True])  # both are running; when the one is looked at, it has ended
            chosen = command("watch", "2").stdout
    finally:
        for name in names:
            shutil.rmtree(stopped / "runs" / name)
    assert said.startswith("error: 2 trainings are running: `watch RUN` follows one of ")
    assert all(name in said for name in names)
    assert chosen.startswith(f"watching runs/{names[1]};")


def test_what_watch_reads_with_a_new_row_was_written_before_it(tmp_path, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr("tinygpt.report.training.write_text", lambda path, text: written.append(path.name))
    row = {"step": 1, "val_loss": 2.0}
    write_curve(TrainState(rows=[row], norms=[row], samples=[{"step": 1, "text": "a"}]), tmp_path)
    assert written[-1] == "train.csv" and sorted(written) == sorted(SEEN)


def test_the_page_of_a_running_training_reloads_itself(stopped, tmp_path):
    (run,) = (stopped / "runs").iterdir()
    write_live(run, tmp_path / "live.html", running=True)
    assert '<meta http-equiv="refresh" content="10">' in (tmp_path / "live.html").read_text()
    (tmp_path / "train.csv").write_text("step\n1\n")
    with pytest.raises(UserError, match="train.csv must have the columns step, train_loss"):
        write_live(tmp_path, tmp_path / "live.html", running=True)


@in_chromium
def test_the_live_page_draws_the_curve_so_far(stopped, browser, tmp_path):  # noqa: F811
    (run,) = (stopped / "runs").iterdir()
    write_live(run, tmp_path / "live.html", running=False)
    problems: list[str] = []
    page = opened(browser, tmp_path / "live.html", problems)
    page.locator("[data-chart=loss] .mark-line path >> nth=1").wait_for(state="attached")
    page.locator("[data-chart=loss] svg").hover()
    shown = page.locator("#vg-tooltip-element td.key")
    shown.first.wait_for()
    assert {text.rstrip(":") for text in shown.all_text_contents()} == {"train loss", "validation loss", "step"}
    assert page.locator("#evaluationstep").text_content().startswith("step ")
    page.close()
    assert problems == []


def test_the_curve_of_a_resumed_run_is_there_at_once(stopped):
    before = evaluated_steps(stopped / "reports")
    for name in SEEN:
        (stopped / "reports" / name).unlink()
    trainer = start_trainer(stopped)
    wait_until(lambda: (stopped / "reports/train.csv").exists(), stopped)
    assert evaluated_steps(stopped / "reports")[: len(before)] == before
    os.kill(trainer.pid, signal.SIGINT)
    assert status_of(trainer) == 130


def test_a_sample_in_the_log_is_short_indented_and_harmless():
    assert shortened("\nab\x1b[2J\n\ncd") == "    ab\\x1b[2J\n    \n    cd"
    assert len(shortened("x" * 1000)) == 204


def test_the_remaining_time_does_not_count_the_slow_first_steps(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    step_of, slept = Trainer._train_step, 3.0

    def first_is_slow(trainer, step, **options):
        time.sleep(slept if step == 0 else 0)
        step_of(trainer, step, **options)

    monkeypatch.setattr(Trainer, "_train_step", first_is_slow)
    train("left", params=dataclasses.replace(PARAMS, eval_every=100), runtime=dataclasses.replace(RUNTIME, log_every=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    left = [re.search(r"(\d+):(\d\d) left", line) for line in lines]
    assert len(lines) >= 10 and all(left[2:])
    assert max(60 * int(found[1]) + int(found[2]) for found in left if found) <= 9  # 10 steps of the first's length: 27
