"""The figures of docs/theory.md and the README, from the library's own functions and the default run's reports.

python -m docs.figures          # writes docs/figures/*.svg

The plain GPT's curve is in docs/figures/plain_gpt.csv, which benchmarks/plain_gpt.py writes.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure

from tinygpt.generate.sampling import FILTERS
from tinygpt.model.layers import rope_tables
from tinygpt.params import from_mapping, load_params
from tinygpt.paths import REPORTS
from tinygpt.report.plots import BLUE, GREEN, GREY, NO_DATE, STYLE, VERMILION
from tinygpt.report.reports import read_curve
from tinygpt.train.config import TrainParams
from tinygpt.train.optim import N_ITERATIONS, NEWTON_SCHULZ
from tinygpt.train.schedules import SCHEDULES, lr_frac_at

FOLDER = Path("docs/figures")
COLORS = (BLUE, VERMILION, GREEN, GREY)
STAGES = ("download", "clean", "train_tokenizer", "encode", "train", "evaluate", "plot", "export", "report")
ARROW = 3  # letters between two stages
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
    """Share of the peak by step, for each schedule."""
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
    curve = pd.DataFrame(read_curve(REPORTS), dtype=float)
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


def overview() -> Figure:
    """The stages, and below them the validation loss of the default run next to a plain GPT's, by seconds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    top, axes = figure.subplots(2, 1, height_ratios=(1, 4))
    top.axis("off")
    ends = [0.0]  # of what is drawn so far, in letters
    for stage in STAGES:
        width = max(map(len, stage.split("_"))) + 2
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLUE if stage == "train" else GREY}
        top.text(ends[-1] + width / 2, 0, stage.replace("_", "\n"), ha="center", va="center", bbox=box)
        ends.append(ends[-1] + width + ARROW)
    for end in ends[1:-1]:
        top.text(end - ARROW / 2, 0, "→", ha="center", va="center", color=GREY)
    top.set(xlim=(0, ends[-1] - ARROW), ylim=(-1, 1))
    curves = pd.read_csv(FOLDER / "plain_gpt.csv")
    for (model, curve), color, style in zip(curves.groupby("model", sort=False), COLORS, ("-o", "--s"), strict=False):
        axes.plot(curve.seconds, curve.val_loss, style, color=color, markersize=3.5, label=model)
    title = "The default run next to a plain GPT of the same size, text and time"
    axes.set(xlabel="seconds of training on two cores", ylabel="validation loss (nats per token)", title=title)
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "rope": rope,
    "newton_schulz": newton_schulz,
    "schedules": schedules,
    "sampling": sampling,
    "loss": loss,
    "overview": overview,
}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "font.size": 9}):
        for name, draw in FIGURES.items():
            draw().savefig(FOLDER / f"{name}.svg", metadata=NO_DATE["svg"])


if __name__ == "__main__":
    main()
