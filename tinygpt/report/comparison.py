"""Several experiments on one page, like that of a run: curves over each other, what differs, samples side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from tinygpt.errors import UserError
from tinygpt.files import atomic_write
from tinygpt.paths import REPORTS
from tinygpt.report.charts import STEPS, comparison_chart, run_styles
from tinygpt.report.compare import METRICS, Experiment, differing
from tinygpt.report.page import parse_rows, render

ERRORS = {"val_loss": "loss_error", "eval_loss": "loss_error", "ppl": "ppl_error", "bpb": "bpb_error"}  # in eval.json
LESS_IS_BETTER = {"val_loss": True, "eval_loss": True, "ppl": True, "bpb": True, "tokens_per_s": False}


@dataclass(frozen=True)
class Made:
    """What an experiment has left."""

    experiment: Experiment
    curve: list[dict[str, float | None]]
    train: dict[str, Any]
    eval: dict[str, Any]
    samples: dict[str, str]  # what it wrote, by prompt


def write_comparison(experiments: Sequence[Experiment], path: Path) -> int:
    """Write the page of those that are done; how many they are.  Raises UserError where none is."""
    found = [read_made(one) for one in experiments if one.metrics]
    unequal = {json.dumps([one.curve, one.eval]): one for one in found if one is not None}  # HEAD may be the workspace
    made = list(unequal.values())
    if not made:
        raise UserError("none of these has reports to show: run `dvc repro`")
    data = {"charts": {"loss": comparison_chart([found.experiment.name for found in made])}, "curve": curve_rows(made)}
    page = render("compare.html", data, **comparison_view(made))
    with atomic_write(path) as file:
        file.write(page)
    return len(made)


def read_made(one: Experiment) -> Made | None:
    """The reports of a revision, or of the workspace; None where it has no curve. Samples only where DVC has them."""
    files = DVCFileSystem(rev=one.rev)

    def read(name: str) -> str:
        try:
            return files.read_text(f"{REPORTS}/{name}", encoding="utf-8")
        except (DvcException, OSError, UnicodeDecodeError):
            return ""

    texts = {name: read(name) for name in ("train.csv", "train.json", "eval.json", "look.json")}
    if not (texts["train.csv"] and texts["train.json"]):
        return None
    try:
        train, evaluation, look = (json.loads(texts[name] or "{}") for name in ("train.json", "eval.json", "look.json"))
        samples = {sample["prompt"]: sample["text"] for sample in look.get("samples", [])}
        return Made(
            one, parse_rows(texts["train.csv"], f"{REPORTS}/train.csv of {one.name}"), train, evaluation, samples
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the reports of {one.name} cannot be read ({error!r}): run it again, or name others") from None


def curve_rows(made: Sequence[Made]) -> list[dict[str, Any]]:
    """All curves, one after the other."""
    rows = list[dict[str, Any]]()
    for found in made:
        last = found.curve[-1]["step"] or 1
        for row in found.curve:
            share = (row["step"] or 0) / last
            at = {"name": found.experiment.name, "step": row["step"], "tokens": round(share * found.train["tokens"])}
            at |= {"epochs": round(share * found.train["epochs"], 4)}
            rows.append(at | {"train": row["train_loss"], "val": row["val_loss"]})
    return rows


def comparison_view(made: Sequence[Made]) -> dict[str, Any]:
    """What the template shows."""
    names = [name for name in METRICS if any(name in found.experiment.metrics for found in made)]
    columns = {name: marked(name, made) for name in names}
    prompts = dict.fromkeys(prompt for found in made for prompt in found.samples)
    return {
        "params": (params := differing([found.experiment for found in made])),
        "metrics": names,
        "axes": STEPS,
        "styles": run_styles(made),
        "rows": [
            {
                "name": found.experiment.name,
                "params": [found.experiment.params.get(name, "-") for name in params],
                "cells": [columns[name][at] for name in names],
            }
            for at, found in enumerate(made)
        ],
        "samples": [
            (prompt, [(found.experiment.name, found.samples[prompt]) for found in made if prompt in found.samples])
            for prompt in prompts
        ],
    }


def marked(name: str, made: Sequence[Made]) -> list[dict[str, str]]:
    """A metric of each: as text, and whether it is the best, or so near that the error may make the difference."""
    values = [found.experiment.metrics.get(name) for found in made]
    known = [value for value in values if value is not None]
    if name not in LESS_IS_BETTER:
        return [{"text": _text(name, value), "kind": ""} for value in values]
    best = min(known) if LESS_IS_BETTER[name] else max(known)
    errors = [float(found.eval.get(ERRORS.get(name, ""), 0.0)) for found in made]
    of_best = errors[values.index(best)]

    def kind(value: float | None, error: float) -> str:
        if value is None or len(known) < 2:
            return ""
        return "best" if value == best else "greyed" if abs(value - best) < 2 * math.hypot(error, of_best) else ""

    return [
        {"text": _text(name, value), "kind": kind(value, error)} for value, error in zip(values, errors, strict=True)
    ]


def _text(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, METRICS[name][2])
