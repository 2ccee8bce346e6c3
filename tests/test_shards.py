"""Shards: nothing is lost or done twice, and results are the same whichever process computes them."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import RUNTIME

from tinygpt import shards
from tinygpt.corpus import folders
from tinygpt.corpus.documents import join_spans
from tinygpt.corpus.folders import cut_lines, shard_texts, text_line, thin
from tinygpt.errors import UserError
from tinygpt.files import atomic_write, runs_folder
from tinygpt.shards import Shard, Span, shard_results

ROOT = Path(__file__).parents[1]
TEXTS = [f"document {i} " + "é\n" * (i % 50) for i in range(500)]


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(folders, "SHARD_BYTES", 1000)
    monkeypatch.setattr(shards, "WORTH_A_WORKER", 1000)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(map(text_line, TEXTS)))
    return path


def upper(shard: Shard, path: Path) -> None:
    """Work that logs which process did it."""
    with atomic_write(path) as out:
        out.writelines(text.upper() + "|" for text in shard_texts(shard))
    with open(path.parents[2] / "done.log", "a") as log:
        log.write(f"{os.getpid()} {path.name}\n")


def die_once(shard: Shard, path: Path, *, parent: int) -> None:
    """Work during which a worker process is killed, once, when the first shard is done."""
    mark = path.parents[2] / "killed"
    if os.getpid() != parent and path.name != "000000" and not mark.exists():
        mark.touch()
        wait_until(path.with_name("000000").exists)
        os.kill(os.getpid(), signal.SIGKILL)
    upper(shard, path)


def fail(shard: Shard, path: Path) -> None:
    """Work that finds a user's mistake."""
    raise UserError(f"cannot do {path.name}")


def results(file: Path, work: shards.Work = upper, **changes: object) -> str:
    runtime = dataclasses.replace(RUNTIME, **changes)
    with shard_results(
        work,
        cut_lines(file),
        name="upper",
        key=file.read_text(),
        code="tinygpt.shards",
        runtime=runtime,
    ) as paths:
        return "".join(path.read_text() for path in paths)


def test_a_kill_while_results_are_removed_leaves_none_that_pass_for_finished_ones(file, monkeypatch):
    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        next(path for path in folder.iterdir() if path.stat().st_size).write_text("half")
        raise KeyboardInterrupt

    expected = results(file)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        results(file)
    assert [path.suffix for path in runs_folder().glob("upper-*")] == [".partial"]
    assert results(file) == expected
    assert not list(runs_folder().glob("upper-*"))


def log(file: Path) -> list[list[str]]:
    return [line.split() for line in (file.parent / "done.log").read_text().splitlines()]


@pytest.mark.parametrize("n_bytes", [1, 999, 1000, 10**9])
def test_shards_cover_the_file_and_end_at_lines(file, monkeypatch, n_bytes):
    monkeypatch.setattr(folders, "SHARD_BYTES", n_bytes)
    monkeypatch.setattr(folders, "MOST_SHARDS", 10**9)
    cut = cut_lines(file)
    spans = [span for shard in cut for span in shard.spans]
    assert [spans[0].begin, *(span.end for span in spans)] == [*(span.begin for span in spans), file.stat().st_size]
    assert [text for shard in cut for text in shard_texts(shard)] == TEXTS
    file.write_text("")
    assert cut_lines(file) == []


def test_small_spans_are_joined():
    spans = [Span(Path(str(i)), 0, size) for i, size in enumerate([3, 3, 9, 1, 20, 2])]
    assert [[span.size for span in shard.spans] for shard in join_spans(spans, 10)] == [[3, 3, 9], [1, 20], [2]]
    assert list(join_spans([], 10)) == []


@pytest.mark.parametrize("max_bytes", [1, 500, 5000, 10**9])
def test_a_thinned_file_is_taken_evenly(file, max_bytes):
    shards_of_all = cut_lines(file)
    thinned = thin(shards_of_all, max_bytes)
    assert sum(shard.size for shard in thinned) <= max_bytes
    assert [shard.spans[0].begin for shard in thinned] == [shard.spans[0].begin for shard in shards_of_all]
    taken = [sum(len(text_line(text).encode()) for text in shard_texts(shard)) for shard in thinned]
    assert all(shard.size <= n <= shard.size + 250 for shard, n in zip(thinned, taken, strict=True))  # whole lines
    assert max(taken) - min(taken[:-1]) <= 500
    assert max_bytes < 10**9 or thinned == shards_of_all


@pytest.mark.parametrize("n_worker", [1, 2, 3])
def test_results_are_the_same_whoever_computes_them_and_no_file_is_left(file, n_worker):
    assert results(file, n_worker=n_worker) == "".join(text.upper() + "|" for text in TEXTS)
    assert len({pid for pid, _ in log(file)}) <= n_worker
    assert not [path for path in (file.parent / "runs").iterdir() if path.suffix != ".lock"]


def test_workers_share_the_work(file):
    results(file, n_worker=2)
    assert len({pid for pid, _ in log(file)}) == 2


def test_only_missing_shards_are_made_after_a_worker_was_killed(file):
    with pytest.raises(UserError, match=r"a worker process was killed.*lower runtime.n_worker and run again"):
        results(file, partial(die_once, parent=os.getpid()), n_worker=2)
    done = {path.name for path in (file.parent / "runs").glob("*/*") if path.name.isdigit()}
    assert done
    (file.parent / "done.log").unlink()  # the worker that was stopped may have made a shard and not logged it
    assert results(file, partial(die_once, parent=os.getpid()), n_worker=2) == "".join(
        text.upper() + "|" for text in TEXTS
    )
    missing = {f"{i:06d}" for i in range(len(cut_lines(file)))} - done
    assert sorted(name for _, name in log(file)) == sorted(missing)


def test_other_texts_take_nothing_from_a_run_that_was_stopped(file):
    with pytest.raises(UserError, match="killed"):
        results(file, partial(die_once, parent=os.getpid()), n_worker=2)
    file.write_text("".join(map(text_line, TEXTS[::-1])))
    assert results(file) == "".join(text.upper() + "|" for text in TEXTS[::-1])


@pytest.mark.parametrize("n_worker", [1, 2])
def test_a_mistake_in_a_worker_is_reported_as_in_this_process(file, n_worker):
    with pytest.raises(UserError, match="cannot do 0000"):
        results(file, fail, n_worker=n_worker)


def test_ray_reports_a_mistake_in_one_line(file):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="cannot do 0000"):
        results(file, fail, engine="ray")
    with pytest.raises(UserError, match=r"runtime.ray_address=127.0.0.1:1: no Ray cluster answers"):
        results(file, engine="ray", ray_address="127.0.0.1:1")


def test_without_ray_the_command_that_helps_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"runtime.engine=ray needs Ray: pip install -r requirements-cluster.txt"):
        results(file, engine="ray")


SLOW = """
import dataclasses, os, sys, time
from pathlib import Path
from tinygpt import shards
from tinygpt.corpus import folders

def work(shard, path):
    (path.parents[2] / f"pid-{os.getpid()}").touch()
    time.sleep(60)

if __name__ == "__main__":
    sys.path.insert(0, "tests")
    from conftest import RUNTIME
    folders.SHARD_BYTES = shards.WORTH_A_WORKER = 1000
    runtime = dataclasses.replace(RUNTIME, n_worker=3)
    of = {"name": "slow", "key": "", "code": "tinygpt.shards"}
    with shards.shard_results(work, folders.cut_lines(Path(sys.argv[1])), **of, runtime=runtime):
        pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_the_program_that_started_them(file):
    (file.parent / "slow.py").write_text(SLOW)
    command = [sys.executable, str(file.parent / "slow.py"), str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(command, cwd=ROOT, env=env)

    def pids() -> set[int]:
        return {int(path.name[4:]) for path in file.parent.glob("pid-*")}

    wait_until(lambda: len(pids()) == 3)
    program.kill()
    program.wait()
    wait_until(lambda: not any(map(is_running, pids())))


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie has ended, but nobody has waited for it


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
