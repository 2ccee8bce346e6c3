"""The page of a run that goes on or was stopped: its curve and its samples so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, must_exist
from tinygpt.report.charts import charts
from tinygpt.report.page import curve_rows, norm_rows, parse_rows, parse_samples, render


def read_curve(folder: Path) -> list[dict[str, float | None]]:
    """The curve that training keeps in a run's folder.  Raises UserError before its first look."""
    path = must_exist(folder / "train.csv", stage="train")
    return parse_rows(path.read_text(encoding="utf-8", errors="replace"), str(path))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The "step" and "text" of each sample there; none where there are none yet."""
    path = folder / "train_samples.md"
    return parse_samples(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def write_live(folder: Path, path: Path, *, running: bool) -> None:
    """Write the page of the run in a folder of runs/.  Raises UserError where its files are damaged."""
    try:
        curve, looks = read_curve(folder), read_samples(folder)
        path_of_norms = folder / "train_norms.csv"  # not there before the first step
        norms = parse_rows(path_of_norms.read_text("utf-8"), str(path_of_norms)) if path_of_norms.exists() else []
        val_losses = {row["step"]: row["val_loss"] for row in curve if row["val_loss"] is not None}
        best = min(val_losses, key=lambda step: val_losses[step] or 0.0)
        data = {"charts": charts(len(norms[0]) - 1 if norms else 1), "curve": curve_rows(curve, best)}
        data |= {"norms": norm_rows(norms), "looks": looks}
        view = {"name": folder.name, "running": running, "last": curve[-1], "looks": looks, "axes": ["step"]}
        page = render("live.html", data, **view, val_losses=val_losses, best_step=best)
    except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
        raise UserError(f"{folder} is not what this version's training writes ({error!r}): run `dvc repro`") from None
    with atomic_write(path) as file:
        file.write(page)
