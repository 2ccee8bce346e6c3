"""The page of a run: one HTML file that needs no other, made from what the stages have written.

Its bytes depend only on those files and on the commits. Text from outside is always escaped.
"""

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.files import human_bytes, write_text
from tinygpt.paths import REPORTS
from tinygpt.report.charts import STEPS, charts
from tinygpt.report.reports import (
    OF_VAL_LOSS,
    Earlier,
    Row,
    differing,
    find_earlier,
    read_curve,
    read_norms,
    read_reports,
    read_samples,
)

ASSETS = Path(__file__).with_name("html")
CLEANED = {  # keys of reports/clean.json in words
    "repaired_bytes": "bytes that were not UTF-8, replaced by U+FFFD",
    "newlines_changed": "line ends changed to \\n",
    "control_removed": "control characters removed",
    "nfc_changed": "documents changed to Unicode NFC",
    "long_cut": "very long documents cut",
    "too_short": "documents dropped: too short",
    "exact_duplicates": "documents dropped: the same as an earlier one",
    "near_duplicates": "documents dropped: almost the same as an earlier one",
    "leaked": "documents dropped from training: also in validation or test",
}


def write_page(root: Path, path: Path) -> None:
    """Write the page of the run in a project's folder.  Raises UserError if a report is of another version."""
    reports = read_reports(root)
    try:
        page = render("run.html", run_data(reports), **run_view(reports, find_earlier(root, reports["eval"])))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UndefinedError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{REPORTS} is damaged or from another version of tinygpt ({reason}): run `dvc repro`"
        ) from None
    write_text(path, page)


def write_live(folder: Path, path: Path, *, running: bool) -> None:
    """Write the page of a run in runs/ that is training or has stopped.  Raises UserError as read_curve does."""
    curve, samples = read_curve(folder), read_samples(folder)
    view = {"name": folder.name, "running": running, "curve": curve, "best": lowest(curve), "samples": samples}
    write_text(path, render("live.html", curve_data(curve, read_norms(folder), samples), **view, axes=STEPS[:1]))


def attention_page(maps: NDArray[np.float32], tokens: Sequence[str]) -> str:
    """A page of attention maps, to choose a head and point at a token.  (n_layer, n_head, T, T)"""
    shares = base64.b64encode((maps * 255).round().astype(np.uint8).tobytes()).decode()
    data = {"attention": {"tokens": list(tokens), "shape": list(maps.shape), "maps": shares}}
    return render("attention.html", data, title="".join(tokens)[:80])


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
        "shell": shlex.quote,
        "python": repr,
        "form": lambda v, form: format(v, form),
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    style, script = (Markup((ASSETS / file).read_text(encoding="utf-8")) for file in ("page.css", "page.js"))
    inner = {"style": style, "script": script, "library": library() if "charts" in data else ""}
    inner["data"] = Markup(text.replace("<", "\\u003c"))  # so that no text can end the script
    return environment.get_template(template).render(**inner, **view)


@cache
def library() -> Markup:
    """Vega's JavaScript, which takes a second to bundle."""
    import vl_convert  # here, because commands that draw nothing import this file too

    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def run_data(reports: dict[str, Any]) -> dict[str, Any]:
    """What the script draws."""
    details, train, rows = reports["details"], reports["train"], reports["details"]["tokenizer"]["lengths"]
    of_all = {"tokens": train["tokens"], "epochs": train["epochs"]}
    return curve_data(reports["curve"], reports["norms"], reports["samples"], **of_all) | {
        "lengths": [{**row, "label": f"{row['bytes']}{'+' * (row is rows[-1])}"} for row in rows],
        "samples": details["samples"],
        "longest": details["tokenizer"]["longest"],
        "paragraph": details["tokenizer"]["paragraph"],
        "attention": details["attention"],
    }


def curve_data(curve: list[Row], norms: list[Row], samples: list[dict[str, Any]], **of_all: float) -> dict[str, Any]:
    """What the script draws of a training run: its curve, its norms with the last part first, and its samples."""
    return {
        "charts": charts(max(map(len, norms), default=2) - 1, STEPS if of_all else STEPS[:1]),
        "curve": curve_rows(curve, **of_all),
        "norms": [
            {"step": row["step"], "part": part, "norm": norm}
            for row in norms
            for part, norm in reversed(row.items())
            if part != "step"
        ],
        "evaluations": samples,
    }


def curve_rows(curve: list[Row], *, tokens: float = 0, epochs: float = 0.0) -> list[dict[str, Any]]:
    """The curve; each row also has the tokens and epochs so far, the latest validation loss, and whether it is best."""
    rows, seen, last, best_row = list[dict[str, Any]](), None, curve[-1]["step"] or 1, lowest(curve)
    for row in curve:
        share = (row["step"] or 0) / last
        seen = row["val_loss"] if row["val_loss"] is not None else seen
        best = f"best: {row['val_loss']:.3f}" if row is best_row else None
        found = {"step": row["step"], "tokens": round(share * tokens), "epochs": round(share * epochs, 4)}
        found |= {"train": row["train_loss"], "val": row["val_loss"]}
        rows.append(found | {"seen": seen, "best": best, "lr": row["lr"], "grad_norm": row["grad_norm"]})
    return rows


def lowest(curve: list[Row]) -> Row:
    """The row with the lowest validation loss."""
    return min((row for row in curve if row["val_loss"] is not None), key=lambda row: row["val_loss"] or 0.0)


def run_view(reports: dict[str, Any], earlier: Earlier | None) -> dict[str, Any]:
    """What the template shows."""
    export = dict(reports["export"])
    return {
        **reports,
        "source": reports["params"]["download.source"],
        "numbers": numbers(reports, earlier),
        "earlier": earlier,
        "axes": STEPS,
        "best": lowest(reports["curve"]),
        "removed": [(words, reports["clean"][key]) for key, words in CLEANED.items() if reports["clean"].get(key)],
        "hf": export.pop("hf", None),
        "gguf": export,
        "operations": sum(part["operations"] for part in reports["details"]["model"]["parts"].values()),
        "groups": [
            (group, list(rows)) for group, rows in groupby(reports["params"].items(), lambda row: row[0].split(".")[0])
        ],
        "changed": changed(reports, earlier),
    }


def numbers(reports: dict[str, Any], earlier: Earlier | None) -> list[dict[str, Any]]:
    """The three main numbers, with their errors, and how they differ from those of an earlier run."""
    now = reports["eval"] | {"val_loss": reports["train"]["val_loss"]}
    was = earlier.eval if earlier else {}
    same_text = all(was.get(key) == now[key] for key in ("split", "bytes"))
    same_tokens = same_text and was["tokens"] == now["tokens"]
    names = {name for name, _, _ in changed(reports, earlier)}
    same_val = same_tokens and not any({name, name.split(".")[0]} & OF_VAL_LOSS for name in names)
    rows = (
        ("Validation loss", "val_loss", "loss_error", ".4f", "nats per token, at its lowest", same_val),
        (f"Bits per byte, {now['split']}", "bpb", "bpb_error", ".4f", "comparable between tokenizers", same_text),
        (f"Perplexity, {now['split']}", "ppl", "ppl_error", ".2f", "per token", same_tokens),
    )
    found = list[dict[str, Any]]()
    for name, key, error, form, unit, comparable in rows:
        shown = None if key == "val_loss" else format(now[error], form)
        found.append({"name": name, "value": format(now[key], form), "error": shown, "unit": unit})
        if earlier and comparable:
            of_both = math.hypot(now[error], was[error])
            found[-1]["verdict"] = verdict(now[key], was[key], of_both, form, commit=earlier.commit)
    return found


def verdict(value: float, before: float, error: float, form: str, *, commit: str) -> dict[str, str]:
    """Whether a number (lower is better) is better than that of a commit, and by how many standard errors."""
    difference, errors = value - before, abs(value - before) / error if error else math.inf
    kind = "same" if errors < 2 else "better" if difference < 0 else "worse"
    words = "within the error" if kind == "same" else f"{kind}, by {errors:.0f} times the error"
    return {"kind": kind, "text": f"commit {commit} has {before:{form}}: {difference:+{form}}, {words}"}


def changed(reports: dict[str, Any], earlier: Earlier | None) -> list[tuple[str, str, str]]:
    """Params that differ from those of an earlier run: name, before, now."""
    if earlier is None:
        return []
    then, now = earlier.params, reports["params"]
    return [(name, then.get(name, "-"), now.get(name, "-")) for name in differing([now, then])]
