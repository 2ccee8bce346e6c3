"""The figures of docs/theory.md, from the library's own functions and the default run's reports.

python -m docs.figures          # writes docs/figures/*.svg
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from tinygpt.generate.sampling import FILTERS
from tinygpt.model.layers import rope_tables
from tinygpt.params import from_mapping, load_params
from tinygpt.paths import REPORTS
from tinygpt.report.plots import BLUE, GREEN, GREY, NO_DATE, STYLE, VERMILION, read_tables
from tinygpt.train.config import TrainParams
from tinygpt.train.optim import N_ITERATIONS, NEWTON_SCHULZ, SCHEDULES, lr_frac_at

FOLDER = Path("docs/figures")
COLORS = (BLUE, VERMILION, GREEN, GREY)
TOKENS_A_STEP = 1024 / 1e6  # of the default run, in millions


def rope() -> Figure:
    """The cosine of some pairs of a head of 32 by position."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    cos, _ = rope_tables(128, 32, 10000.0)
    for pair, color in zip((0, 3, 6, 12), COLORS, strict=True):
        axes.plot(cos[:, pair], color=color, label=f"pair {pair}", linewidth=1.2)
    axes.set(xlabel="position", ylabel="cosine of the angle", title="The first pairs turn fast, the last hardly at all")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def newton_schulz() -> Figure:
    """A singular value after each iteration, by where it began."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    begin = torch.linspace(0.002, 1, 500)
    a, b, c = NEWTON_SCHULZ
    now = begin
    axes.plot(begin, now, ":", color=GREY, label="before")
    for n in range(1, N_ITERATIONS + 1):
        now = a * now + b * now**3 + c * now**5
        if n in (1, 3, N_ITERATIONS):
            axes.plot(begin, now, color=COLORS[n // 2], label=f"after {n}")
    axes.set(xlabel="singular value before", ylabel="after", title="Newton–Schulz brings singular values near 1")
    axes.legend()
    return figure


def schedules() -> Figure:
    """Share of the peak by step, for each schedule with the default's warmup."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    params = dataclasses.replace(load_params(TrainParams), warmup_steps=100)
    for (name, style), color in zip(zip(SCHEDULES, ("-", "--", "-.", ":"), strict=True), COLORS, strict=True):
        changed = from_mapping(TrainParams, {**vars(params), "schedule": name})
        shares = [lr_frac_at(step, changed) for step in range(params.max_steps)]
        axes.plot(shares, style, color=color, label=name)
    axes.set(xlabel="step", ylabel="share of lr", title="Schedules, with a warmup of 100 steps")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def sampling() -> Figure:
    """One distribution of twelve tokens, and what each option leaves of it."""
    options = {"temperature": 0.6, "top_k": 3, "top_p": 0.8, "min_p": 0.5, "typical_p": 0.3}
    logits = torch.tensor([[3.0, 2.6, 2.2, 1.6, 1.2, 0.8, 0.4, 0.0, -0.4, -0.8, -1.2, -2.0]])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    for axes, (name, value) in zip(figure.subplots(2, 3, sharey=True).flat, {"": 0.0, **options}.items(), strict=True):
        changed = FILTERS[name](logits, value) if name else logits
        axes.bar(range(12), logits.softmax(-1)[0], color=GREY, alpha=0.3)
        axes.bar(range(12), changed.softmax(-1)[0], color=BLUE, width=0.5)
        axes.set(title=f"{name} = {value}" if name else "as it is", xticks=[])
    return figure


def loss() -> Figure:
    """The default run's loss by tokens seen, from where an even guess begins."""
    curve = read_tables(REPORTS).curve
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    tokens = curve.step * TOKENS_A_STEP
    axes.plot(tokens, curve.train_loss.rolling(20, min_periods=1, center=True).mean(), color=BLUE, label="train")
    val = curve.dropna(subset="val_loss")
    axes.plot(val.step * TOKENS_A_STEP, val.val_loss, "--o", color=VERMILION, markersize=3.5, label="validation")
    axes.axhline(math.log(1024), color=GREY, linestyle=":", label="an even guess: log 1024")
    axes.set(xlabel="million tokens seen", ylabel="loss (nats per token)", title="The default run")
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "rope": rope,
    "newton_schulz": newton_schulz,
    "schedules": schedules,
    "sampling": sampling,
    "loss": loss,
}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "font.size": 9}):
        for name, draw in FIGURES.items():
            draw().savefig(FOLDER / f"{name}.svg", metadata=NO_DATE["svg"])


if __name__ == "__main__":
    main()
