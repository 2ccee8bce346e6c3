"""The constants of tinygpt/plan/recipe.py, fitted on the runs of benchmarks/scaling.csv, with the residuals.

    python -m benchmarks.scaling_fit          # prints both, draws docs/figures/scaling.svg

Least squares of logarithms, by the Levenberg-Marquardt method (https://doi.org/10.1137/0111030). Rows whose rates,
weight decay or dropout differ from the recipe's are left out.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.scaling import TABLE
from tinygpt.plan.measure import between
from tinygpt.plan.recipe import LAW, LAYERS, Law, Size, dropout_for
from tinygpt.plan.text import PROBE_SIZES, PROBE_STEPS
from tinygpt.report.plots import BLUE, GREEN, GREY, NO_DATE, STYLE, VERMILION

Row = Mapping[str, str]
Vector = NDArray[np.float64]

FIGURE = Path("docs/figures/scaling.svg")
MANY = 9  # a text with as many runs has a color of its own
PINK = "#CC79A7"
WHOLE = 10_000_000  # max_bytes that shortens no text of the table by much
FITTED = ("weights", "weights_power", "power", "start", "overfit", "repeats", "batch")
PROBE = {"n_embd": str(min(LAYERS)), "max_steps": str(PROBE_STEPS), "max_bytes": str(WHOLE)}
OF_THE_RECIPE = {"lr_times": "1.0", "weight_decay": "0.1"}


def read_rows(table: Path = TABLE) -> list[Row]:
    """The runs with the recipe's own values."""
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in OF_THE_RECIPE.items())]
    return [row for row in rows if float(row["dropout"]) == dropout_for(float(row["epochs"]))]


def text_of(row: Row) -> str:
    """The text's name, with its size if it was cut: the beginning of a text counts as another text."""
    return row["text"] if int(row["max_bytes"]) >= WHOLE else f"{row['text']} {int(row['max_bytes']) // 1000} kB"


def size_of(row: Row) -> Size:
    """What decides the loss of a run."""
    number = {key: float(value) for key, value in row.items() if key != "text"}
    return Size(
        n_weights=number["n_params"] - 1.5 * number["vocab"] * number["n_embd"],
        n_all_weights=number["n_params"],
        n_tokens=number["tokens"],
        n_unique=number["train_tokens"],
        batch_tokens=number["batch_size"] * number["block_size"],
        bytes_per_token=number["train_bytes"] / number["train_tokens"],
        copied=number["copied"],
    )


Difficulties = Mapping[str, Mapping[int, float]]  # by text and vocab_size


def said(row: Row, law: Law, difficulties: Difficulties) -> float:
    """The loss of a run by the law."""
    return between(difficulties[text_of(row)], int(row["vocab_size"])) * law.loss(size_of(row))


def probes(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The runs as small as those that `plan` makes of a text, by text and vocab_size."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if all(row[key] == value for key, value in PROBE.items()) and int(row["vocab_size"]) in PROBE_SIZES:
            found.setdefault(text_of(row), {})[int(row["vocab_size"])] = row
    return found


def fit(rows: Sequence[Row]) -> tuple[Law, dict[str, dict[int, float]]]:
    """The law, and the difficulty of each text: for the vocabularies of its small runs, where it has both."""
    small = probes(rows)
    texts = sorted(set(map(text_of, rows)))
    columns = [(text, size) for text in texts for size in (PROBE_SIZES if len(small.get(text, ())) > 1 else (1024,))]
    sizes = [size_of(row) for row in rows]
    parts = np.zeros((len(rows), len(columns)))  # of each logarithm of a difficulty, in the run's
    for part, row in zip(parts, rows, strict=True):
        mine = [i for i, (text, _) in enumerate(columns) if text == text_of(row)]
        for i in mine:
            ends = {columns[j][1]: math.e if j == i else 1.0 for j in mine}
            part[i] = math.log(between(ends, int(row["vocab_size"])))
    seen = np.log([float(row["val_bpb"]) for row in rows])

    def law_of(logs: Vector) -> Law:
        return replace(LAW, **dict(zip(FITTED, map(float, np.exp(logs)), strict=False)))

    def errors(logs: Vector) -> Vector:
        law = law_of(logs)
        return np.log([law.loss(size) for size in sizes]) + parts @ logs[len(FITTED) :] - seen

    start = np.log([getattr(LAW, name) for name in FITTED])
    found = least_squares(errors, np.concatenate([start, np.full(len(columns), 0.3)]))
    difficulties: dict[str, dict[int, float]] = {text: {} for text in texts}
    for (text, size), log in zip(columns, found[len(FITTED) :], strict=True):
        difficulties[text][size] = math.exp(log)
    return law_of(found), difficulties


def least_squares(errors: Callable[[Vector], Vector], start: Vector, *, n_steps: int = 200) -> Vector:
    """The minimum of the sum of squared errors, near the start."""
    at, now, damping, nudge = start, errors(start), 1e-3, 1e-5
    for _ in range(n_steps):
        slopes = np.array([(errors(at + nudge * unit) - now) / nudge for unit in np.eye(len(at))]).T
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(len(at))), -slopes.T @ now)
        trial = errors(at + np.clip(step, -1, 1))
        if trial @ trial < now @ now:
            at, now, damping = at + np.clip(step, -1, 1), trial, damping / 3
        else:
            damping *= 4
    return at


def forecasts(rows: Sequence[Row], law: Law) -> dict[str, list[float]]:
    """By text, the errors of what `plan` would say of its larger runs, from the losses of its small ones."""
    found: dict[str, list[float]] = {}
    for text, small in probes(rows).items():
        measured = {size: float(row["val_bpb"]) / law.loss(size_of(row)) for size, row in small.items()}
        least = max(law.loss(size_of(row)) for row in small.values())
        larger = [row for row in rows if text_of(row) == text and row not in small.values()]
        found[text] = [
            said(row, law, {text: measured}) / float(row["val_bpb"]) - 1
            for row in larger
            if law.loss(size_of(row)) < least
        ]
    return found


def draw(rows: Sequence[Row], law: Law, difficulties: Difficulties) -> Figure:
    """Losses of the runs by those of the law, and errors of the law by tokens.  Crosses: a text's beginning."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    losses, seen = figure.subplots(1, 2)
    counts = Counter(row["text"] for row in rows)
    named = sorted(text for text, n in counts.items() if n >= MANY)
    groups = {text: [row for row in rows if row["text"] == text] for text in named}
    groups[f"{len(counts) - len(named)} more texts"] = [row for row in rows if row["text"] not in named]
    for (name, group), color in zip(groups.items(), (BLUE, VERMILION, GREEN, GREY, PINK), strict=True):
        for is_whole, marker, label in ((True, "o", name), (False, "x", None)):
            mine = [row for row in group if (int(row["max_bytes"]) >= WHOLE) is is_whole]
            bpb = [float(row["val_bpb"]) for row in mine]
            predicted = [said(row, law, difficulties) for row in mine]
            losses.plot(predicted, bpb, marker, markersize=4, color=color, label=label)
            tokens = [float(row["tokens"]) / 1e6 for row in mine]
            errors = [100 * (a / b - 1) for a, b in zip(predicted, bpb, strict=True)]
            seen.plot(tokens, errors, marker, markersize=4, color=color)
    ends = losses.get_xlim()
    losses.plot(ends, ends, color=GREY, linewidth=0.8)
    losses.set(xlabel="bits per byte by the law", ylabel="bits per byte of the run")
    figure.legend(loc="outside right")  # type: ignore[call-overload]  # its types lack "outside"
    seen.axhline(0, color=GREY, linewidth=0.8)
    seen.set(xlabel="million tokens of the run", ylabel="error of the law in percent", xscale="log")
    millions = sorted({float(row["tokens"]) / 1e6 for row in rows})
    seen.set_xticks(millions, [f"{n:.1f}" for n in millions], minor=False)
    seen.minorticks_off()
    return figure


def main() -> None:
    """Fit, print and draw."""
    rows = read_rows()
    law, difficulties = fit(rows)
    print(f"{len(rows)} runs: {law}")
    print("; ".join(f"{text} {', '.join(f'{d:.3f}' for d in each.values())}" for text, each in difficulties.items()))
    errors = {}
    for row in rows:
        tokens = f"{row['max_steps']} steps of {row['batch_size']} x {row['block_size']}, {row['epochs']} epochs"
        name = f"{text_of(row)}, width {row['n_embd']}, vocabulary {row['vocab']}, {tokens}, dropout {row['dropout']}"
        errors[name] = said(row, law, difficulties) / float(row["val_bpb"]) - 1
    print(f"root mean square of the errors {math.sqrt(np.mean(np.square([*errors.values()]))):.2%}; the largest:")
    for name, error in sorted(errors.items(), key=lambda item: -abs(item[1]))[:12]:
        print(f"{error:7.2%}  {name}")
    print("errors of forecasts from small models:")
    for text, found in forecasts(rows, law).items():
        print(f"{text:12} {min(found):6.1%} to {max(found):6.1%} in {len(found)} runs")
    with mpl.rc_context(STYLE):
        draw(rows, law, difficulties).savefig(FIGURE, metadata=NO_DATE["svg"])


if __name__ == "__main__":
    main()
