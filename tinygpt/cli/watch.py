"""`python -m tinygpt watch`: a training from a second terminal, and on a page that loads itself again."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from tinygpt.cli.runs import is_locked
from tinygpt.errors import UserError
from tinygpt.files import runs_folder
from tinygpt.paths import REPORTS
from tinygpt.progress import shortened
from tinygpt.report.page import write_live
from tinygpt.report.reports import read_curve, read_samples

EVERY_S = 1.0  # seconds between two looks at the files
BARS = "▁▂▃▄▅▆▇█"
SHOWN = 24  # validation losses drawn in a line


def watch(args: Namespace) -> None:
    """Print a line and a sample for each look, those that were first; until the training ends or is stopped."""
    folder = find_run(args.run)
    page, n_told = args.page or REPORTS / "live.html", 0
    print(f"watching {folder}; {page} shows it in a browser")
    while True:
        running = is_locked(folder)
        rows = read_curve(folder)
        looks = [row for row in rows if row["val_loss"] is not None]
        if len(looks) > n_told or not running:
            samples = {sample["step"]: sample["text"] for sample in read_samples(folder)}
            for at in range(n_told, len(looks)):
                print(told(looks[: at + 1]))
                if text := samples.get(looks[at]["step"]):
                    print(shortened(text))
            n_told = len(looks)
            write_live(folder, page, running=running)
        if not running:
            break
        time.sleep(EVERY_S)
    print(f"nothing trains in {folder} any more: step {rows[-1]['step']:,.0f}, see `python -m tinygpt runs`")


def find_run(name: str | None) -> Path:
    """The folder of runs/ whose name begins so, or that which wrote last.  Raises UserError unless it is one."""
    found = sorted(runs_folder().glob("*/train.csv"), key=lambda path: path.stat().st_mtime)
    named = found[-1:] if name is None else [path for path in found if path.parent.name.startswith(name)]
    if len(named) != 1:
        there = ", ".join(path.parent.name for path in reversed(found)) or "no run has come to its first look"
        raise UserError(f"{len(named)} runs are called {name or 'anything'}: take one of {there}")
    return named[0].parent


def told(looks: list[dict[str, float | None]]) -> str:
    """The last look in a line, with the losses up to it as a row of bars."""
    losses = [row["val_loss"] or 0.0 for row in looks[-SHOWN:]]
    low, width = min(losses), max(losses) - min(losses) or 1.0
    bars = "".join(BARS[round((loss - low) / width * (len(BARS) - 1))] for loss in losses)
    train = looks[-1]["train_loss"]
    said = "" if train is None else f"train loss {train:.4f}  "
    return f"step {looks[-1]['step']:>6,.0f}  {said}val loss {losses[-1]:.4f}  {bars}"
