"""The page of a run: one HTML file that needs no other, made of what the stages have written down.

Its bytes depend on those files and on the commits alone. Whatever comes from outside is put in as text.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, human_bytes, must_exist, read_json
from tinygpt.params import PARAMS_FILE, flat_params
from tinygpt.paths import REPORTS
from tinygpt.report.charts import STEPS, charts
from tinygpt.report.history import Earlier, find_earlier

ASSETS = Path(__file__).with_name("html")
LOOK = re.compile(r"^## Step ([\d,]+)\n\n(`{3,})text\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
JSON_REPORTS = {"clean": "clean", "train": "train", "eval": "evaluate", "export": "export", "look": "evaluate"}
CLEANED = {  # keys of reports/clean.json in words
    "repaired_bytes": "bytes that are not UTF-8, now U+FFFD",
    "newlines_changed": "line ends made \\n",
    "control_removed": "control characters removed",
    "nfc_changed": "documents with characters composed",
    "long_cut": "documents cut, being very long",
    "too_short": "documents dropped: too short",
    "exact_duplicates": "documents dropped: the same as one before",
    "near_duplicates": "documents dropped: almost the same as one before",
    "leaked": "documents dropped from training: also in validation or test",
}


class Reports(NamedTuple):
    """What the stages have written."""

    clean: dict[str, Any]
    train: dict[str, Any]
    eval: dict[str, Any]
    export: dict[str, Any]
    look: dict[str, Any]
    curve: list[dict[str, float | None]]
    norms: list[dict[str, float | None]]
    samples: list[dict[str, Any]]  # "step" and "text" of those written at each look
    params: dict[str, str]  # by "group.key", but for the group runtime


def read_reports(root: Path) -> Reports:
    """Read a project's.  Raises UserError that names the stage of one that is missing or damaged."""
    folder = root / REPORTS

    def text(name: str) -> str:
        return must_exist(folder / name, stage="train").read_text(encoding="utf-8", errors="replace")

    return Reports(
        **{name: read_json(folder / f"{name}.json", stage=stage) for name, stage in JSON_REPORTS.items()},
        curve=parse_rows(text("train.csv"), f"{folder}/train.csv"),
        norms=parse_rows(text("train_norms.csv"), f"{folder}/train_norms.csv"),
        samples=parse_samples(text("train_samples.md")),
        params=flat_params((root / PARAMS_FILE).read_bytes()),
    )


def parse_rows(text: str, name: str) -> list[dict[str, float | None]]:
    """The rows of a CSV of numbers; None where a field is empty.  (pandas takes longer to import than this page.)

    Raises UserError that names it.
    """
    try:
        if not text.endswith("\n"):
            raise ValueError("its last line is cut")
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(text.splitlines())]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{name} is no table of numbers ({error}): run `dvc repro train`") from None


def _number(text: str) -> float | None:
    number = None if text == "" else float(text)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{text} in it")
    return number


def write_page(root: Path, path: Path) -> None:
    """Write the page of the run in a project's folder.  Raises UserError where a report is of another version."""
    reports = read_reports(root)
    try:
        page = render("run.html", run_data(reports), **run_view(reports, find_earlier(root, reports.eval)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UndefinedError) as error:
        raise UserError(f"{REPORTS} is not what this version writes ({error!r}): run `dvc repro`") from None
    with atomic_write(path) as file:
        file.write(page)


def render(template: str, data: Mapping[str, Any], **view: Any) -> str:
    """A page with its style, its script, the library that draws charts, and `data` for the script."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "n": lambda value: f"{value:,.0f}",
        "visible": visible,
        "form": lambda v, form: format(v, form),
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    inner = {
        name: Markup((ASSETS / file).read_text(encoding="utf-8"))
        for name, file in (("style", "page.css"), ("script", "page.js"))
    }
    return environment.get_template(template).render(
        **inner, library=library(), data=Markup(text.replace("<", "\\u003c")), **view
    )


@cache
def library() -> Markup:
    """Vega, which takes a second to be put together."""
    import vl_convert  # here, as commands that draw nothing import this file

    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def visible(token: str) -> str:
    """A token as a name: spaces and line ends can be seen."""
    return token.translate({ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"}) or "∅"


def run_data(reports: Reports) -> dict[str, Any]:
    """What the script draws."""
    look, train, rows = reports.look, reports.train, reports.look["tokenizer"]["lengths"]
    return {
        "charts": charts(len(reports.norms[0]) - 1),
        "curve": curve_rows(reports.curve, train["best_step"], tokens=train["tokens"], epochs=train["epochs"]),
        "norms": norm_rows(reports.norms),
        "lengths": [{**row, "label": f"{row['bytes']}{'+' * (row is rows[-1])}"} for row in rows],
        "looks": reports.samples,
        "samples": look["samples"],
        "paragraph": look["tokenizer"]["paragraph"],
        "attention": look["attention"],
    }


def curve_rows(
    curve: list[dict[str, float | None]], best_step: float | None, *, tokens: int = 0, epochs: float = 0.0
) -> list[dict[str, Any]]:
    """The curve with each row's share of all tokens and epochs, and the newest validation loss seen at it."""
    rows, seen, last = list[dict[str, Any]](), None, curve[-1]["step"] or 1
    for row in curve:
        share = (row["step"] or 0) / last
        seen = row["val_loss"] if row["val_loss"] is not None else seen
        best = f"best: {row['val_loss']:.3f}" if row["step"] == best_step and row["val_loss"] is not None else None
        found = {"step": row["step"], "tokens": round(share * tokens), "epochs": round(share * epochs, 4)}
        found |= {"train": row["train_loss"], "val": row["val_loss"]}
        rows.append(found | {"seen": seen, "best": best, "lr": row["lr"], "grad_norm": row["grad_norm"]})
    return rows


def norm_rows(norms: list[dict[str, float | None]]) -> list[dict[str, Any]]:
    """A row for each part at each look, the last part first."""
    return [
        {"step": row["step"], "part": part, "norm": norm}
        for row in norms
        for part, norm in reversed(row.items())
        if part != "step"
    ]


def parse_samples(text: str) -> list[dict[str, Any]]:
    """The "step" and the "text" of each sample in a train_samples.md."""
    return [{"step": int(step.replace(",", "")), "text": found} for step, _, found in LOOK.findall(text)]


def run_view(reports: Reports, earlier: Earlier | None) -> dict[str, Any]:
    """What the template shows."""
    export = dict(reports.export)
    return {
        "clean": reports.clean,
        "train": reports.train,
        "eval": reports.eval,
        "look": reports.look,
        "source": reports.params["download.source"],
        "numbers": numbers(reports, earlier),
        "earlier": earlier,
        "looks": reports.samples,
        "axes": STEPS,
        "best_step": reports.train["best_step"],
        "val_losses": {row["step"]: row["val_loss"] for row in reports.curve if row["val_loss"] is not None},
        "removed": [(words, reports.clean[key]) for key, words in CLEANED.items() if reports.clean.get(key)],
        "hf": export.pop("hf", None),
        "gguf": export,
        "operations": sum(part["operations"] for part in reports.look["model"]["parts"].values()),
        "groups": [
            (group, list(rows)) for group, rows in groupby(reports.params.items(), lambda row: row[0].split(".")[0])
        ],
        "changed": changed(reports, earlier),
    }


def numbers(reports: Reports, earlier: Earlier | None) -> list[dict[str, Any]]:
    """The three numbers that one decides by, with their error, and what has become of them since."""
    split, found = reports.eval["split"], reports.eval
    rows = [
        ("Validation loss", reports.train["val_loss"], None, ".4f", "nats per token, at its lowest"),
        (f"Bits per byte, {split}", found["bpb"], found["bpb_error"], ".4f", "comparable between tokenizers"),
        (f"Perplexity, {split}", found["ppl"], found["ppl_error"], ".2f", "of a token"),
    ]
    before: list[tuple[float, float] | None] = [None] * 3
    if earlier is not None:
        same_text = all(earlier.eval.get(key) == found[key] for key in ("split", "bytes"))
        same_tokens = same_text and earlier.eval.get("tokens") == found["tokens"]
        loss_error = math.hypot(found["loss_error"], earlier.eval.get("loss_error", 0.0))
        before[0] = (earlier.train["val_loss"], loss_error) if same_tokens else None
        before[1] = (
            (earlier.eval["bpb"], math.hypot(found["bpb_error"], earlier.eval["bpb_error"])) if same_text else None
        )
        before[2] = (
            (earlier.eval["ppl"], math.hypot(found["ppl_error"], earlier.eval["ppl_error"])) if same_tokens else None
        )
    return [
        {"name": name, "value": format(value, form), "error": error and format(error, form), "unit": unit}
        | ({"verdict": verdict(value, *was, form)} if was else {})
        for (name, value, error, form, unit), was in zip(rows, before, strict=True)
    ]


def verdict(value: float, before: float, error: float, form: str) -> dict[str, str]:
    """Whether a number, of which less is better, has become better, and by how many standard errors."""
    difference, errors = value - before, abs(value - before) / error if error else math.inf
    kind = "same" if errors < 2 else "better" if difference < 0 else "worse"
    words = "within the error" if kind == "same" else f"{kind}, by {errors:.0f} times the error"
    return {"kind": kind, "text": f"{difference:+{form}} ({words}); it was {before:{form}}"}


def changed(reports: Reports, earlier: Earlier | None) -> list[tuple[str, str, str]]:
    """Params that differ from those of the run before: name, before, now."""
    if earlier is None:
        return []
    then = flat_params(earlier.params.encode())
    names = dict.fromkeys([*reports.params, *then])
    return [
        (name, then.get(name, "-"), reports.params.get(name, "-"))
        for name in names
        if then.get(name) != reports.params.get(name)
    ]
