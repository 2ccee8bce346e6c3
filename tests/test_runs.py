"""The list of runs is right, and nothing is removed that may still be needed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RUNTIME
from filelock import FileLock

from tinygpt.cli import runs
from tinygpt.cli.flags import find_run
from tinygpt.run.checkpoint import PARTS, Checkpoints
from tinygpt.shards import Shard, Span, shard_results
from tinygpt.train.trainer import TrainState

HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(300)
"""
NAMES = [letter * 16 for letter in "abcd"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def training(name: str, *, step: int, age: int, finished: bool = False) -> None:
    """Make a training of 40 steps that reached `step` `age` seconds ago."""
    rows = [{"step": 5, "val_loss": 3.5}, {"step": 6, "val_loss": None}, {"step": 7, "val_loss": 3.75}]
    tensors = {part: {"weight": torch.zeros(1000)} for part in PARTS}
    with Checkpoints(name) as checkpoints:
        checkpoints.note(max_steps=40, finished=finished)
        if step:
            checkpoints.save(TrainState(step=step, rows=rows, best_step=5, best_val_loss=3.5), tensors)
    for path in [checkpoints.folder, *checkpoints.folder.rglob("*")]:
        os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def told(command) -> Callable[..., str]:
    """The output of `python -m tinygpt runs`, which must succeed."""

    def run(options: str = "") -> str:
        done = command("runs", *options.split())
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def four_runs() -> None:
    """From the newest to the oldest: finished, stopped, finished, and stopped before its first checkpoint."""
    for age, (name, step, finished) in enumerate(zip(NAMES, (40, 20, 40, 0), (True, False, True, False), strict=True)):
        training(name, step=step, finished=finished, age=7200 * (age + 1))


def test_each_run_is_listed_with_its_state_the_newest_first(folder, told):
    four_runs()
    lines = [line.split() for line in told().splitlines()]
    size = 3 * (4000 + 72)  # three files of 1000 float32 and safetensors' header
    assert lines[0] == ["run", "state", "done", "best_val_loss", "last_val_loss", "size", "age", "name"]
    assert [line[:8] for line in lines[1:5]] == [
        ["aaaaaaaa", "finished", "40", "of", "40", "steps", "3.5000", "3.7500"],
        ["bbbbbbbb", "interrupted", "20", "of", "40", "steps", "3.5000", "3.7500"],
        ["cccccccc", "finished", "40", "of", "40", "steps", "3.5000", "3.7500"],
        ["dddddddd", "interrupted", "0", "of", "40", "steps", "-", "-"],
    ]
    assert [line[-3:] for line in lines[1:5]] == [[str(n), "h", "-"] for n in (2, 4, 6, 8)]
    found = {found.folder.name: found for found in runs.find_runs(folder)}
    on_disk = sum(path.stat().st_size for path in (folder / NAMES[1]).rglob("*") if path.is_file())
    assert size < found[NAMES[1]].size == on_disk


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("", "bd"),
        ("--all", ""),
        ("--keep 1", "abd"),
        ("--all --keep 2", "ab"),
        ("--keep 9", "abcd"),
    ],
)
def test_pruning_removes_what_was_requested(folder, options, left, told):
    four_runs()
    before = sum(found.size for found in runs.find_runs(folder))
    (folder / "notes").mkdir()  # a user's own folder
    said = told(f"--prune {options}")
    assert names(folder) == [letter * 16 for letter in left] + ["notes"]
    freed = runs.human_bytes(before - sum(found.size for found in runs.find_runs(folder)))
    assert said.splitlines()[-1].startswith(f"removed {4 - len(left)} of 4 in ")
    assert said.endswith(f": {freed} freed\n")


def test_a_run_is_kept_while_a_program_holds_it_and_removed_when_that_was_killed(folder, told):
    training(NAMES[0], step=40, finished=True, age=0)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder / NAMES[0] / "lock"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert told().splitlines()[1].split()[1] == "running"
        found = runs.Run(folder / NAMES[0], "finished", "", None, None, 0, 0.0)  # the state a moment ago
        assert not runs.remove(found)
        assert "removed 0 of 1" in told("--prune --all")
        assert names(folder) == NAMES[:1]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert told().splitlines()[1].split()[1] == "finished"
    assert "removed 1 of 1" in told("--prune")
    assert names(folder) == []


def killed(folder: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise KeyboardInterrupt


def test_the_shards_of_other_stages_are_unfinished_work(folder, tmp_path, told, monkeypatch):
    def work(shard: Shard, path: Path) -> None:
        if shard.spans[0].begin:
            raise OSError("the disk is gone")
        path.write_text("done")

    shards = [Shard((Span(tmp_path / "text", begin, begin + 5),)) for begin in (0, 5)]
    with (
        pytest.raises(OSError, match="the disk is gone"),
        shard_results(work, shards, name="encode-train", key=1, code="tinygpt.shards", runtime=RUNTIME),
    ):
        pass
    (found,) = runs.find_runs(folder)
    assert (found.state, found.done, found.size) == ("interrupted", "1 shard", 4)
    assert found.name.startswith("encode-train-") and len(found.name) == len("encode-train-") + 8
    with FileLock(folder / "encode-train.lock"):
        assert runs.find_runs(folder)[0].state == "running"
    assert "removed 0 of 1" in told("--prune")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        runs.remove(found)
    assert runs.find_runs(folder) == []  # what is left of it passes for none
    (left,) = folder.glob("*.partial")
    shutil.copytree(left, found.folder)  # the same shards are made again
    assert runs.remove(found) and not left.exists()
    left.mkdir()
    told("--prune")
    assert not left.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": 3}', '{"max_steps": "20", "finished": true}'])
@pytest.mark.parametrize(("file", "done"), [("step-0000025/state.json", "20 of 40 steps"), ("run.json", "25 steps")])
def test_where_a_checkpoint_is_damaged_the_one_before_is_listed(folder, file, done, damage):
    training(NAMES[0], step=20, age=0)
    training(NAMES[0], step=25, age=0)
    (folder / NAMES[0] / file).write_text(damage)
    (found,) = runs.find_runs(folder)
    assert (found.state, found.done, found.best) == ("damaged", done, 3.5)


def test_a_program_killed_while_writing_run_json_does_not_stop_the_next(folder):
    training(NAMES[0], step=20, age=0)
    (folder / NAMES[0] / "run.json.partial").write_text("{")
    training(NAMES[0], step=25, age=0)
    assert runs.find_runs(folder)[0].done == "25 of 40 steps"


def test_checkpoints_are_kept_by_their_step_and_later_damaged_ones_go(folder):
    with Checkpoints(NAMES[0]) as checkpoints:
        (checkpoints.folder / "step-0000008.bak").mkdir()  # not ours
        for step in (9_999_900, 10_000_000, 10_000_100, 10_000_000):
            checkpoints.save(TrainState(step=step), {part: {"weight": torch.tensor([float(step)])} for part in PARTS})
            assert checkpoints.newest_weights().parent.name == f"step-{step:07d}"
        state, tensors = checkpoints.load_latest()
    assert (state.step, tensors["weights"]["weight"].item()) == (10_000_000, 1e7)
    assert names(checkpoints.folder) == ["step-0000008.bak", "step-10000000"]


def test_a_run_that_evaluates_an_average_writes_texts_with_it(folder):
    with Checkpoints(NAMES[0]) as checkpoints:
        for step, averages in ((1, {}), (2, {"a": torch.zeros(1)})):
            tensors = {"weights": {"a": torch.ones(1)}, "optimizer": {}, "best": {}, "ema": averages}
            checkpoints.save(TrainState(step=step), tensors)
            assert checkpoints.newest_weights().name == ("ema" if averages else "weights") + ".safetensors"


def test_a_checkpoint_that_goes_meanwhile_is_not_the_newest(folder, monkeypatch):
    training(NAMES[0], step=3, age=9)
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda path, pattern: [*glob(path, pattern), path / "gone/step-0000001/state.json"]
    )
    assert find_run(None, "step-*/state.json").name == NAMES[0]


def test_a_run_of_adapters_is_not_taken_for_another(folder, command):
    training(NAMES[0], step=20, age=60)
    (folder / NAMES[1] / "step-0000001.9.partial").mkdir(parents=True)  # a checkpoint that is being written
    (folder / NAMES[1] / "step-0000001.9.partial/state.json").touch()
    said = command("generate", "--run", "newest", "--prompt", "The").stderr
    assert said.endswith(
        f"{NAMES[0]} has no model that --run can read: it trains adapters, or has just begun. Use data/model when it "
        "has finished\n"
    )


def test_an_empty_runs_folder_is_not_a_mistake(folder, told):
    assert told() == f"{folder} holds no run: training keeps its checkpoints there\n"
    assert told("--prune") == f"removed 0 of 0 in {folder}: 0 B freed\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--all", "--all and --keep say what --prune removes: add --prune"),
        ("--prune --keep -1", "--keep=-1 must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_reported(command, options, message):
    done = command("runs", *options.split())
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
