"""Plots of the training curve, as SVG and PNG whose bytes depend on the numbers alone.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by colour-blind people; lines differ in
style as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def read_curve(path: Path) -> pd.DataFrame:
    """reports/train.csv as a table.  Raises UserError when it is missing or has other columns."""
    try:
        curve = pd.read_csv(must_exist(path, stage="train"))
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is no CSV ({error}): run `dvc repro train`") from None
    if list(curve.columns) != COLUMNS or curve.empty:
        raise UserError(f"{path} must have the columns {', '.join(COLUMNS)} and a row: run `dvc repro train`")
    return curve


def read_norms(path: Path) -> pd.DataFrame:
    """reports/train_norms.csv as a table.  Raises UserError when it is missing or no such table."""
    try:
        norms = pd.read_csv(must_exist(path, stage="train"))
    except ValueError as error:
        raise UserError(f"{path} is no CSV ({error}): run `dvc repro train`") from None
    if norms.columns[:1].tolist() != ["step"] or len(norms.columns) < 2 or norms.empty:
        raise UserError(f"{path} must have a column step, one for each part, and a row: run `dvc repro train`")
    return norms


def write_plots(curve: pd.DataFrame, norms: pd.DataFrame, folder: Path, params: PlotParams) -> list[str]:
    """Write every figure in every format; return the names of the files."""
    names = []
    with mpl.rc_context(STYLE), atomic_folder(folder) as partial:
        figures = {name: plot(curve, params) for name, plot in FIGURES.items()} | {"norms": plot_norms(norms)}
        for name, figure in figures.items():
            for extension in params.formats:
                names.append(f"{name}.{extension}")
                figure.savefig(partial / names[-1], dpi=params.dpi, metadata=NO_DATE[extension])
    return names


def plot_loss(curve: pd.DataFrame, params: PlotParams) -> Figure:
    """Training and validation loss by step, the best step marked."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    smooth = curve.train_loss.rolling(params.smooth, min_periods=1, center=True).mean()
    axes.plot(curve.step, smooth, color=BLUE, linewidth=1.2, label="train")
    val = curve.dropna(subset="val_loss")
    axes.plot(val.step, val.val_loss, "--o", color=VERMILION, markersize=3.5, label="validation")
    best = val.sort_values("val_loss", kind="stable").iloc[0]
    label = f"best: {best.val_loss:.3f} at step {best.step:,.0f}"
    axes.plot([best.step], [best.val_loss], "*", color=GREEN, markersize=14, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training and validation loss")
    axes.legend()
    return figure


def plot_optimizer(curve: pd.DataFrame, params: PlotParams) -> Figure:
    """Learning rate and gradient norm by step, one above the other."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(curve.step, curve.lr, color=GREEN, linewidth=1.5)
    above.set(ylabel="learning rate", title="Learning rate and gradient norm")
    below.plot(curve.step, curve.grad_norm, color=GREY, linewidth=0.9)
    below.set(xlabel="step", ylabel="gradient norm\n(before clipping)", yscale="log")
    return figure


def plot_norms(norms: pd.DataFrame) -> Figure:
    """The gradient of each part at each look: a column for a step, a row for a part, the first one below."""
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


FIGURES = {"loss": plot_loss, "optimizer": plot_optimizer}
