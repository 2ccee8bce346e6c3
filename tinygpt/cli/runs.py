"""`python -m tinygpt runs`, `watch`, `compare`: what has been trained, in runs/ and in DVC's experiments.

Training keeps its checkpoints in runs/<fingerprint>; other stages keep their shards in runs/<name>-<fingerprint> until
they are done. Anything else in runs/ is left alone.
"""

import contextlib
import os
import re
import shutil
import sys
import time
import webbrowser
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from tinygpt.cli.flags import find_run
from tinygpt.errors import UserError
from tinygpt.files import human_bytes, remove_folder, runs_folder
from tinygpt.params import load_params
from tinygpt.paths import PAGE, REPORTS
from tinygpt.progress import shortened
from tinygpt.report.compare import MOST_CURVES, as_text, compare_table, find_experiments, find_made, write_comparison
from tinygpt.report.config import PlotParams
from tinygpt.report.page import write_live
from tinygpt.report.plots import plot_curves
from tinygpt.report.reports import read_curve, read_samples
from tinygpt.run.folder import PLAN_FILE, checkpoints_in, read_name, read_plan, read_state

NAME = re.compile(r"([a-z-]+-)?[0-9a-f]{16}")
SHORT = 8  # digits shown of a fingerprint
EVERY_S = 1.0  # seconds between two reads of the files of a run that is watched
BARS = "▁▂▃▄▅▆▇█"
N_BAR = 24  # at most this many validation losses in a row of bars


@dataclass(frozen=True)
class Run:
    """One folder of runs/."""

    folder: Path
    state: str  # finished, interrupted, running or damaged
    done: str  # steps or shards
    best: float | None  # lowest validation loss, nats per token
    last: float | None  # newest validation loss
    size: int  # bytes
    changed: float  # time of the last change, in seconds since 1970

    @property
    def name(self) -> str:
        """The folder's name with a shortened fingerprint."""
        return self.folder.name[: SHORT - 16]


def runs(args: Namespace) -> None:
    """Print the table of runs, or remove some and print how much space that freed."""
    if (args.all or args.keep is not None) and not args.prune:
        raise UserError("--all and --keep say what --prune removes: add --prune")
    folder = runs_folder()
    there = find_runs(folder)
    if args.prune:
        states = ("finished", "interrupted", "damaged") if args.all else ("finished",)
        chosen = [found for found in there if found.state in states][args.keep or 0 :]
        removed = [found for found in chosen if remove(found)]
        for left in folder.glob("*.partial"):  # by a removal that was killed
            shutil.rmtree(left, ignore_errors=True)
        for found in removed:
            print(f"{found.name}: {found.state}, {found.done}, {human_bytes(found.size)}")
        print(f"removed {len(removed)} of {len(there)} in {folder}: {human_bytes(sum(r.size for r in removed))} freed")
    elif there:
        rows = [
            {
                "run": found.name,
                "state": found.state,
                "done": found.done,
                "best_val_loss": _loss(found.best),
                "last_val_loss": _loss(found.last),
                "size": human_bytes(found.size),
                "age": _age(time.time() - found.changed),
                "name": read_name(found.folder) or "-",
            }
            for found in there
        ]
        print(pd.DataFrame(rows).to_string(index=False))
        freed = sum(found.size for found in there if found.state == "finished")
        print(f"{human_bytes(sum(r.size for r in there))} in {folder}; `runs --prune` frees {human_bytes(freed)}")
    else:
        print(f"{folder} holds no run: training keeps its checkpoints there")


def find_runs(folder: Path) -> list[Run]:
    """The runs in runs/, newest first."""
    paths = [path for path in folder.glob("*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(map(read_run, paths), key=lambda found: (-found.changed, found.folder.name))


def read_run(folder: Path) -> Run:
    """Read one run, which a trainer may be changing meanwhile."""
    stats = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # in a checkpoint that the trainer has just removed
                stats.append(Path(parent, name).stat())
    size = sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())  # a file may have two names
    changed = max((stat.st_mtime for stat in stats), default=folder.stat().st_mtime)
    running = is_locked(folder)
    if "-" in folder.name:  # shards
        n = sum(path.name.isdigit() for path in folder.glob("*"))
        done = f"{n:,} shard{'s' * (n != 1)}"
        return Run(folder, "running" if running else "interrupted", done, None, None, size, changed)
    try:
        plan, damaged = read_plan(folder), False
    except UserError:
        plan, damaged = None, True
    progress, unread = _newest_progress(folder)
    of = f" of {plan.max_steps:,}" if plan else ""  # a trainer of an older version left no plan
    losses = [row["val_loss"] for row in progress.get("rows", []) if row["val_loss"] is not None]
    state = "damaged" if damaged or unread else "finished" if plan and plan.finished else "interrupted"
    steps = f"{progress.get('step', 0):,}{of} steps"
    best, last = progress.get("best_val_loss"), losses[-1] if losses else None
    return Run(folder, "running" if running else state, steps, best, last, size, changed)


def remove(found: Run) -> bool:
    """Remove a run's folder unless a program works in it (again); returns whether it was removed."""
    try:
        with _lock(found.folder):
            remove_folder(found.folder)
    except Timeout:
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether a running program works in the folder: the lock of a killed one is free."""
    try:
        with _lock(folder):
            pass
    except Timeout:
        return True
    return False


def _lock(folder: Path) -> FileLock | contextlib.nullcontext[None]:
    """Holds a folder's lock for a block, or raises Timeout.  A lock that was never held has no file, and gets none."""
    path = folder.with_name(f"{folder.name[:-17]}.lock") if "-" in folder.name else folder / "lock"
    return FileLock(path, timeout=0) if path.exists() else contextlib.nullcontext()


def _newest_progress(folder: Path) -> tuple[dict[str, Any], int]:
    """The progress in the newest readable checkpoint, and how many newer ones cannot be read."""
    checkpoints = checkpoints_in(folder)[::-1]
    for damaged, checkpoint in enumerate(checkpoints):
        with contextlib.suppress(UserError):
            return read_state(checkpoint)[0], damaged
    return {}, len(checkpoints)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def watch(args: Namespace) -> None:
    """Print a line and a sample for each evaluation, past ones first, while the training runs."""
    begun = [path.parent for path in runs_folder().glob(f"*/{PLAN_FILE}") if is_locked(path.parent)]
    begun = [each for each in begun if each.name.startswith(args.run or "")]
    if len(begun) > 1:
        names = ", ".join(each.name for each in begun)
        raise UserError(f"{len(begun)} trainings are running: `watch RUN` follows one of {names}")
    folder = begun[0] if begun else find_run(args.run, "train.csv")
    page, n_shown = args.page or REPORTS / "live.html", 0
    print(f"watching {folder}; {page} shows it in a browser", flush=True)
    while not (folder / "train.csv").exists() and is_locked(folder):  # before its first evaluation
        time.sleep(EVERY_S)
    while True:
        running = is_locked(folder)
        rows = read_curve(folder)
        evaluations = [row for row in rows if row["val_loss"] is not None]
        if len(evaluations) > n_shown or not running:
            samples = {sample["step"]: sample["text"] for sample in read_samples(folder)}
            for at in range(n_shown, len(evaluations)):
                print(evaluation_line(evaluations[: at + 1]))
                if text := samples.get(evaluations[at]["step"]):
                    print(shortened(text))
            n_shown = len(evaluations)
            write_live(folder, page, running=running)
        if not running:
            break
        time.sleep(EVERY_S)
    print(f"no training is running in {folder} any more ({read_run(folder).done}): see `python -m tinygpt runs`")


def evaluation_line(evaluations: list[dict[str, float | None]]) -> str:
    """The last evaluation as a line, with the losses up to it as a row of bars."""
    losses = [row["val_loss"] or 0.0 for row in evaluations[-N_BAR:]]
    low, width = min(losses), max(losses) - min(losses) or 1.0
    bars = "".join(BARS[round((loss - low) / width * (len(BARS) - 1))] for loss in losses)
    train = evaluations[-1]["train_loss"]
    said = "" if train is None else f"train loss {train:.4f}  "
    return f"step {evaluations[-1]['step']:>6,.0f}  {said}val loss {losses[-1]:.4f}  {bars}"


def compare(args: Namespace) -> None:
    """Print the table, draw the curves, make the page."""
    experiments = find_experiments(args.rev)
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    print(as_text(compare_table(experiments), width))
    if not args.rev and all(one.is_baseline for one in experiments):
        print("no experiments of this commit yet: `dvc exp run -S train.lr=1e-3` makes one")
    if not (args.plot or args.page or args.open):
        return
    made = find_made(experiments)
    shown = made[:MOST_CURVES]
    why = "; equal ones are shown once, those without reports not at all" if len(made) < len(experiments) else ""
    why += f"; at most {MOST_CURVES}, those listed first" if len(shown) < len(made) else ""
    if args.plot:
        plot_curves({one.name: one.curve for one in shown}, args.plot, load_params(PlotParams))
        print(f"{args.plot} shows {len(shown)} of {len(experiments)}{why}")
    if args.page or args.open:
        page = args.page or PAGE.with_name("compare.html")
        write_comparison(shown, page)
        print(f"{page} shows {len(shown)} of {len(experiments)}{why}")
        if args.open:
            webbrowser.open(page.absolute().as_uri())
