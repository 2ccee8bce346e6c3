"""Plots of the training curve, as SVG and PNG whose bytes depend on the numbers alone.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by colour-blind people; lines differ in
style as well.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, must_exist
from tinygpt.report.config import PlotParams

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
AGAIN = "run `dvc repro train`"
COLUMNS = ["step", "train_loss", "val_loss", "lr", "grad_norm"]

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tinygpt",  # else ids of SVG elements are random
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


class Tables(NamedTuple):
    """What training has written down on the way."""

    curve: pd.DataFrame  # COLUMNS, a row for one step or several
    norms: pd.DataFrame  # the step of each evaluation, and the norm of each part's gradient


def read_tables(reports: Path) -> Tables:
    """train.csv and train_norms.csv.  Raises UserError when one is missing, has other columns, or a row that is cut."""
    curve, norms = (must_exist(reports / name, stage="train") for name in ("train.csv", "train_norms.csv"))
    return Tables(parse_curve(curve.read_bytes(), str(curve)), _parse(norms.read_bytes(), str(norms)))


def parse_curve(raw: bytes, name: str) -> pd.DataFrame:
    """The numbers of a train.csv, with a validation loss at least.  Raises UserError that names it, and the line."""
    curve = _parse(raw, name, COLUMNS, ["train_loss", "lr"])
    if curve.val_loss.isna().all():
        raise UserError(f"{name} has no validation loss: {AGAIN}")
    return curve


def _parse(raw: bytes, name: str, columns: list[str] | None = None, needed: Sequence[str] = ()) -> pd.DataFrame:
    """A table of numbers, of which some are needed in each row after step 0."""
    try:
        with warnings.catch_warnings(action="error"):  # of rows longer than the header
            table = pd.read_csv(io.BytesIO(raw), index_col=False)
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{name} is not a CSV ({error}): {AGAIN}") from None
    named = ["step", *filter(str.isidentifier, table.columns[1:])]  # as parts of a model are
    if table.empty or list(table.columns) != (columns or named) or len(named) < 2:
        shown = ", ".join(columns or ["step", "one for each part"])
        raise UserError(f"{name} must have the columns {shown}, and a row: {AGAIN}")
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = (numbers.isna() & table.notna() | np.isinf(numbers)).any(axis=1)  # a text, or beyond all numbers
    wrong |= numbers.step.isna() | (numbers.step.diff() <= 0)
    wrong |= numbers[[*needed]].isna().any(axis=1) & (numbers.step > 0)
    wrong.iloc[-1] |= not raw.endswith(b"\n")
    if wrong.any():
        raise UserError(f"{name} is cut or damaged in line {wrong.argmax() + 2}: {AGAIN}")
    return table


def write_plots(tables: Tables, folder: Path, params: PlotParams) -> list[str]:
    """Write every figure in every format; return the names of the files."""
    names = []
    with mpl.rc_context(STYLE), atomic_folder(folder) as partial:
        for name, plot in FIGURES.items():
            figure = plot(tables, params)
            for extension in params.formats:
                names.append(f"{name}.{extension}")
                figure.savefig(partial / names[-1], dpi=params.dpi, metadata=NO_DATE[extension])
    return names


def plot_loss(tables: Tables, params: PlotParams) -> Figure:
    """Training and validation loss by step, the best step marked."""
    curve = tables.curve
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train = curve.dropna(subset="train_loss")
    smooth = train.train_loss.rolling(params.smooth, min_periods=1, center=True).mean()
    axes.plot(train.step, smooth, color=BLUE, linewidth=1.2, label="train")
    val = curve.dropna(subset="val_loss")
    axes.plot(val.step, val.val_loss, "--o", color=VERMILION, markersize=3.5, label="validation")
    best = val.sort_values("val_loss", kind="stable").iloc[0]
    label = f"best: {best.val_loss:.3f} at step {best.step:,.0f}"
    axes.plot([best.step], [best.val_loss], "*", color=GREEN, markersize=14, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training and validation loss")
    axes.legend()
    return figure


def plot_optimizer(tables: Tables, params: PlotParams) -> Figure:
    """Learning rate and gradient norm by step, one above the other."""
    curve = tables.curve
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(curve.step, curve.lr, color=GREEN, linewidth=1.5)
    above.set(ylabel="learning rate", title="Learning rate and gradient norm")
    below.plot(curve.step, curve.grad_norm, color=GREY, linewidth=0.9)
    below.set(xlabel="step", ylabel="gradient norm\n(before clipping)", yscale="log")
    return figure


def plot_norms(tables: Tables, params: PlotParams) -> Figure:
    """The gradient of each part at each evaluation: a column for a step, a row for a part, the first one below."""
    norms = tables.norms
    parts = norms.columns[1:]
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(parts)), layout="constrained")
    axes = figure.subplots()
    values = norms[parts].to_numpy(float).T
    low, high = _limits(values)
    shown = np.maximum(values, low)  # a zero has no logarithm
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="cividis", norm=LogNorm(low, high))
    every = max(1, len(norms) // 8)
    axes.set_xticks(range(0, len(norms), every), [f"{step:,}" for step in norms.step[::every]])
    axes.set_yticks(range(len(parts)), parts)
    axes.grid(visible=False)
    axes.set(xlabel="step", title="Gradient norm by part")
    figure.colorbar(image, ax=axes, label="2-norm, before clipping")
    return figure


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """The smallest and largest of the numbers above zero, a little apart."""
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    return float(low), float(max(high, low * 1.01))


FIGURES: dict[str, Callable[[Tables, PlotParams], Figure]] = {
    "loss": plot_loss,
    "optimizer": plot_optimizer,
    "norms": plot_norms,
}
