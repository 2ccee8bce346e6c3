"""DVC's experiments side by side: what was changed, what came of it, and their curves in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import dvc.api
import matplotlib as mpl
import pandas as pd
from dvc.exceptions import DvcException
from matplotlib.figure import Figure
from pygit2 import GitError

from tinygpt.errors import UserError
from tinygpt.files import atomic_write
from tinygpt.params import GROUPS
from tinygpt.report.config import PlotParams
from tinygpt.report.plots import NO_DATE, STYLE, parse_curve

CURVE = "reports/train.csv"
METRICS = {  # column -> the report, the key in it, and how it is shown
    "val_loss": ("reports/metrics/train.json", "val_loss", ".4f"),
    "eval_loss": ("reports/metrics/eval.json", "eval_loss", ".4f"),  # of the split evaluate.split
    "ppl": ("reports/metrics/eval.json", "ppl", ",.2f"),
    "bpb": ("reports/metrics/eval.json", "bpb", ".4f"),
    "n_params": ("reports/metrics/train.json", "n_params", ",.0f"),
    "seconds": ("reports/metrics/train.json", "seconds", ",.0f"),
    "tokens_per_s": ("reports/metrics/train.json", "tokens_per_s", ",.0f"),
    "peak_mem_gib": ("reports/metrics/train.json", "peak_mem_gib", ".2f"),
}
WORDS = {"None": "null", "True": "true", "False": "false"}  # DVC's spelling -> that of params.yaml
WORKSPACE = "workspace"
WIDEST = 24  # letters of a param that are shown
MOST_CURVES = 14  # that colour and style tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's
DASHES = ("-", "--")


@dataclass(frozen=True)
class Experiment:
    """One row: the workspace, a commit, or what `dvc exp run` has made."""

    name: str
    rev: str | None  # None for the workspace
    state: str  # Queued, Running or Failed; empty where it is done
    params: dict[str, str]  # as params.yaml has them, by "group.key"
    metrics: dict[str, float]  # of METRICS, those that it has
    is_baseline: bool  # no experiment, but what experiments start from


def find_experiments(revs: Sequence[str] = ()) -> list[Experiment]:
    """These revisions; without any the workspace, HEAD and its experiments, the lowest validation loss first.

    Raises UserError for what DVC does not know.
    """
    if revs:
        return [_revision(rev) for rev in revs]
    found = [experiment_of(row) for row in _show(None)]
    bases, others = [one for one in found if one.is_baseline], [one for one in found if not one.is_baseline]
    return bases + sorted(others, key=lambda one: one.metrics.get("val_loss", math.inf))


def experiment_of(row: dict[str, Any]) -> Experiment:
    """One of DVC's rows: it names a key alone, or with its file where two files have the same key."""
    state = (row["State"] or "").replace("Success", "")
    found = {name: row.get(key, row.get(f"{file}:{key}")) for name, (file, key, _) in METRICS.items()}
    if state:  # queued, running or failed: the reports beside it are still those of the commit that it started from
        found = {}
    return Experiment(
        name=row["Experiment"] or row["rev"],
        rev=None if row["rev"] == WORKSPACE else row["rev"],
        state=state,
        params={key: _value(value) for key, value in row.items() if key.split(".")[0] in GROUPS and value is not None},
        metrics={name: value for name, value in found.items() if isinstance(value, float)},
        is_baseline=row["typ"] == "baseline",
    )


def compare_table(experiments: Sequence[Experiment]) -> pd.DataFrame:
    """A row an experiment, as text: the params in which they differ, and the metrics that any of them has."""
    columns: dict[str, list[str]] = {"experiment": [one.name for one in experiments]}
    if any(one.state for one in experiments):
        columns["state"] = [one.state for one in experiments]
    for name in differing(experiments):
        values = [one.params.get(name, "-") for one in experiments]
        columns[name] = [value if len(value) <= WIDEST else value[: WIDEST - 1] + "…" for value in values]
    for name, (_, _, form) in METRICS.items():
        if any(name in one.metrics for one in experiments):
            columns[name] = [format(one.metrics[name], form) if name in one.metrics else "-" for one in experiments]
    return pd.DataFrame(columns)


def differing(experiments: Sequence[Experiment]) -> list[str]:
    """The params, by "group.key", in which those differ that have any."""
    known = [one.params for one in experiments if one.params]
    names = dict.fromkeys(name for params in known for name in params)
    return [name for name in names if len({params.get(name) for params in known}) > 1]


def as_text(table: pd.DataFrame, width: int | None) -> str:
    """The table in lines of that many letters, its columns one block below the other where they need more."""
    named = table.set_index("experiment").rename_axis(None).rename_axis("experiment", axis="columns")
    return named.to_string(line_width=width)


def read_curves(experiments: Sequence[Experiment]) -> dict[str, pd.DataFrame]:
    """The curve of each that has one, by name; of equal ones, as of HEAD and a clean workspace, the last."""
    names: dict[str, str] = {}
    for one in experiments:
        if not one.metrics:  # queued, running or failed
            continue
        try:
            names[dvc.api.read(CURVE, rev=one.rev)] = one.name
        except (DvcException, FileNotFoundError):  # a commit without one
            continue
    return {name: parse_curve(text.encode(), f"{CURVE} of {name}") for text, name in names.items()}


def plot_curves(curves: dict[str, pd.DataFrame], path: Path, params: PlotParams) -> None:
    """Training and validation loss by step, a colour and style for each experiment."""
    with mpl.rc_context(STYLE), atomic_write(path, "wb") as file:
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        styles = zip(cycle(COLOURS), cycle(DASHES), strict=True)  # 7 and 2: fourteen before they repeat
        for (name, curve), (colour, dash) in zip(curves.items(), styles, strict=False):
            val = curve.dropna(subset="val_loss")
            train = curve.dropna(subset="train_loss")
            smooth = train.train_loss.rolling(params.smooth, min_periods=1, center=True).mean()
            left.plot(train.step, smooth, dash, color=colour, linewidth=1.2)
            label = f"{name}: {val.val_loss.min():.3f}"
            right.plot(val.step, val.val_loss, f"{dash}o", color=colour, markersize=3.5, label=label)
        left.set_ylim(*_limits([*curves.values()]))
        left.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
        right.set(xlabel="step", title="Validation loss")
        figure.legend(loc="outside right upper", title="lowest validation loss", frameon=False)
        suffix = path.suffix[1:]
        figure.savefig(file, format=suffix, dpi=params.dpi, metadata=NO_DATE[suffix])


def _limits(curves: list[pd.DataFrame]) -> tuple[float, float]:
    """Of the axis: the first losses, high above all that differs, are left out."""
    low = min(curve[["train_loss", "val_loss"]].min().min() for curve in curves)
    high = max(curve.val_loss[curve.step > 0].max() for curve in curves)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _revision(rev: str) -> Experiment:
    if rev == WORKSPACE:
        return experiment_of(_show(None)[0])
    _, row, *_ = _show(rev)  # the workspace, the revision, and what starts from it
    return experiment_of(row | {"Experiment": rev})


def _show(rev: str | None) -> list[dict[str, Any]]:
    try:
        return dvc.api.exp_show(revs=rev)
    except (DvcException, GitError) as error:
        raise UserError(f"DVC finds no {rev or 'project'} here ({error}): see `git log` and `dvc exp list`") from None


def _value(value: float | str) -> str:
    """A param as params.yaml has it: DVC's table makes texts of all but numbers, and of those floats."""
    return f"{value:g}" if isinstance(value, float) else WORDS.get(value, value)
