"""Plots of training curves, tokenizers and attention, as SVG and PNG whose bytes depend on the numbers alone.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart; lines
differ in style as well.  T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tinygpt.files import atomic_folder, atomic_write, must_exist
from tinygpt.report.charts import run_styles
from tinygpt.report.config import PlotParams
from tinygpt.report.reports import Row, read_curve, read_norms

if TYPE_CHECKING:
    from tinygpt.report.tokenizer import Fit
    from tinygpt.tokenizer import Tokenizer

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
MOST_LABELS = 16  # tokens that can be read at the axes of a small map

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tinygpt",  # else the ids of SVG elements are random
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


Table = np.recarray[Any, Any]  # `table.step` is a column, float64; NaN where a row has no number


class Tables(NamedTuple):
    """What training has recorded."""

    curve: Table  # a row for every step, or for several
    norms: Table  # the step of each evaluation, and the norm of each part's gradient


def read_tables(reports: Path) -> Tables:
    """train.csv and train_norms.csv.  Raises UserError if one is missing, has other columns, or a row that is cut."""
    must_exist(reports / "train_norms.csv", stage="train")  # read_norms accepts a missing file
    return Tables(as_table(read_curve(reports)), as_table(read_norms(reports)))


def as_table(rows: Sequence[Row]) -> Table:
    """At least one row of numbers, as columns.  (pandas would take as long to import as the plots to draw.)"""
    return np.array([tuple(row.values()) for row in rows], [(name, float) for name in rows[0]]).view(np.recarray)


def known(table: Table, column: str) -> Table:
    """The rows that have a number in `column`."""
    return table[~np.isnan(table[column])]


def write_plots(tables: Tables, folder: Path, params: PlotParams) -> list[str]:
    """Write every figure in every format; return the names of the files."""
    names = []
    with mpl.rc_context(STYLE), atomic_folder(folder) as partial:
        for name, plot in FIGURES.items():
            figure = plot(tables, params)
            for extension in params.formats:
                names.append(f"{name}.{extension}")
                save(figure, partial / names[-1], dpi=params.dpi)
    return names


def plot_loss(tables: Tables, params: PlotParams) -> Figure:
    """Training and validation loss by step, with the best step marked."""
    curve = tables.curve
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*smoothed(curve, params), color=BLUE, linewidth=1.2, label="train")
    val = known(curve, "val_loss")
    axes.plot(val.step, val.val_loss, "--o", color=VERMILION, markersize=3.5, label="validation")
    best = val[val.val_loss.argmin()]
    label = f"best: {best.val_loss:.3f} at step {best.step:,.0f}"
    axes.plot([best.step], [best.val_loss], "*", color=GREEN, markersize=14, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training and validation loss")
    axes.legend()
    return figure


def smoothed(curve: Table, params: PlotParams) -> tuple[NDArray[np.float64], list[float]]:
    """Steps, and the training loss as the mean of `params.smooth` rows around each, fewer at the ends."""
    train, before, after = known(curve, "train_loss"), params.smooth // 2, (params.smooth + 1) // 2
    losses = train.train_loss
    return train.step, [losses[max(0, i - before) : i + after].mean() for i in range(len(losses))]


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
    """Each part's gradient norm at each evaluation: a column for a step, a row for a part, the first at the bottom."""
    norms = tables.norms
    parts = norms.dtype.names[1:]
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(parts)), layout="constrained")
    axes = figure.subplots()
    values = np.array([norms[part] for part in parts])
    scale = "log" if (values > 0).any() else "linear"  # zero has no logarithm, and its place stays empty
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="cividis", norm=scale)
    every = max(1, len(norms) // 8)
    axes.set_xticks(range(0, len(norms), every), [f"{step:,.0f}" for step in norms.step[::every]])
    axes.set_yticks(range(len(parts)), parts)
    axes.grid(visible=False)
    axes.set(xlabel="step", title="Gradient norm by part")
    figure.colorbar(image, ax=axes, label="2-norm, before clipping")
    return figure


FIGURES: dict[str, Callable[[Tables, PlotParams], Figure]] = {
    "loss": plot_loss,
    "optimizer": plot_optimizer,
    "norms": plot_norms,
}


def plot_curves(curves: dict[str, list[Row]], path: Path, params: PlotParams) -> None:
    """Training and validation loss by step, a colour and style for each experiment."""
    tables = {name: as_table(rows) for name, rows in curves.items()}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, curve), (colour, style) in zip(tables.items(), run_styles([*tables]), strict=True):
            drawn = {"color": colour.replace("$ink", "#000000"), "linestyle": style}
            left.plot(*smoothed(curve, params), linewidth=1.2, **drawn)
            val = known(curve, "val_loss")
            right.plot(
                val.step, val.val_loss, marker="o", markersize=3.5, label=f"{name}: {val.val_loss.min():.3f}", **drawn
            )
        # leave out the first losses, which are far above all differences
        low = min(np.nanmin([curve.train_loss, curve.val_loss]) for curve in tables.values())
        high = max(np.fmax.reduce(curve.val_loss[curve.step > 0], initial=low) for curve in tables.values())
        margin = 0.05 * (high - low) or 0.05
        left.set_ylim(low - margin, high + margin)
        left.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
        right.set(xlabel="step", title="Validation loss")
        figure.legend(loc="outside right upper", title="lowest validation loss", frameon=False)
        save(figure, path, params.dpi)


def plot_attention(maps: NDArray[np.float32], tokens: Sequence[str], path: Path) -> None:
    """A row of small maps for each layer; darker is more.  (n_layer, n_head, T, T)"""
    n_layer, n_head = maps.shape[:2]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure = Figure(figsize=(1.2 + 1.8 * n_head, 0.6 + 1.8 * n_layer), layout="constrained")
        axes = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
        for (layer, head), axis in np.ndenumerate(axes):
            image = axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"layer {layer}, head {head}", fontsize=7)
            if len(tokens) <= MOST_LABELS:
                axis.set_xticks(range(len(tokens)), tokens, rotation=90)
                axis.set_yticks(range(len(tokens)), tokens)
            else:
                axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.supxlabel("token attended to")
        figure.supylabel("token that attends")
        figure.colorbar(image, ax=axes, shrink=0.6, label="weight")
        save(figure, path)


def plot_fit(fits: Mapping[str, tuple[Tokenizer, Fit]], path: Path) -> None:
    """How often tokens occur, by rank, and the share of the text in tokens of each length."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, (tokenizer, fit)), color, style in zip(
            fits.items(), (BLUE, VERMILION, GREEN), ("-", "--", ":"), strict=False
        ):
            used = np.sort(fit.counts[fit.counts > 0])[::-1]
            left.plot(np.arange(1, len(used) + 1), used, style, color=color, label=name)
            sizes = np.array(tokenizer.token_bytes)
            share = np.bincount(sizes, weights=fit.counts * sizes) / fit.n_bytes
            right.plot(np.arange(1, len(share)), share[1:], style, color=color, marker="o", markersize=3, label=name)
        left.set(xscale="log", yscale="log", xlabel="token, by rank", ylabel="occurrences", title="How often")
        right.set(xlabel="bytes of a token", ylabel="share of the text", title="How long", xlim=(0, 20.5))
        left.legend()
        save(figure, path)


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure, whole or not at all; the file's name says whether it is SVG or PNG."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=dpi, metadata=NO_DATE[path.suffix[1:]])
