"""DVC's experiments side by side: a table of what was changed and what came of it, and a page with their curves."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from pygit2 import GitError

from tinygpt.errors import UserError
from tinygpt.files import write_text
from tinygpt.params import GROUPS, PARAMS_FILE
from tinygpt.paths import MODEL, REPORTS
from tinygpt.report.charts import STEPS, comparison_chart, run_styles
from tinygpt.report.page import curve_rows, render
from tinygpt.report.reports import OF_VAL_LOSS, TEXT, TOKENS, Row, differing, parse_curve
from tinygpt.yaml12 import load_yaml

METRICS = {  # of reports/metrics, and their formats
    "val_loss": ".4f",
    "eval_loss": ".4f",  # of the split evaluate.split
    "ppl": ",.2f",
    "bpb": ".4f",
    "n_params": ",.0f",
    "seconds": ",.0f",
    "tokens_per_s": ",.0f",
    "peak_mem_gib": ".2f",
}
WORDS = {"None": "null", "True": "true", "False": "false"}  # DVC's spelling -> that of params.yaml
WORKSPACE = "workspace"
CHANGED = "Changed"  # params.yaml, since it was last run
DECIDING = ("download", "clean", "train_tokenizer", "train")  # stages whose params decide all metrics
EVALUATED = {"eval_loss", "ppl", "bpb"}  # the metrics of the stage evaluate
WIDEST = 24  # characters of a param that are shown
MOST_CURVES = 14  # as many as colour and line style can tell apart
LOSSES = {  # metric, lower is better -> its error in eval.json, and the groups and params in which runs must agree
    "val_loss": ("loss_error", OF_VAL_LOSS),
    "eval_loss": ("loss_error", TOKENS | {"evaluate.split"}),
    "ppl": ("ppl_error", TOKENS | {"evaluate.split"}),
    "bpb": ("bpb_error", TEXT | {"evaluate.split"}),
}


@dataclass(frozen=True)
class Experiment:
    """One row: the workspace, a commit, or an experiment of `dvc exp run`."""

    name: str
    rev: str | None  # None for the workspace
    state: str  # Queued, Running, Failed or Changed; empty where it is done
    params: dict[str, str]  # as params.yaml has them, by "group.key"
    metrics: dict[str, float]  # the METRICS that it has
    is_baseline: bool  # what experiments start from, not an experiment


def find_experiments(revs: Sequence[str] = ()) -> list[Experiment]:
    """These revisions; if none, the workspace, HEAD and its experiments, sorted by validation loss.

    Raises UserError for a revision that DVC does not know.
    """
    if revs:
        return [_without_old_metrics(_revision(rev)) for rev in revs]
    found = [_without_old_metrics(experiment_of(row)) for row in _show(None)]
    bases = [one for one in found if one.is_baseline]
    others = [one for one in found if not one.is_baseline]
    return bases + sorted(others, key=lambda one: one.metrics.get("val_loss", math.inf))


def experiment_of(row: dict[str, Any]) -> Experiment:
    """An experiment from DVC's row."""
    state = (row["State"] or "").replace("Success", "")
    metrics = {name: row[name] for name in METRICS if isinstance(row.get(name), float)}
    if state or "val_loss" not in metrics:  # not trained yet: its reports are those of the run before
        metrics = {}
    return Experiment(
        name=row["Experiment"] or row["rev"],
        rev=None if row["rev"] == WORKSPACE else row["rev"],
        state=state,
        params={key: _value(value) for key, value in row.items() if _is_param(key) and value is not None},
        metrics=metrics,
        is_baseline=row["typ"] == "baseline",
    )


def _is_param(key: str) -> bool:
    """Whether it is group.key of params.yaml: DVC's rows also have the stages of reports/code.json."""
    return "." in key and key.split(".")[0] in GROUPS


def _without_old_metrics(one: Experiment) -> Experiment:
    """The same, without metrics of a run before: params.yaml was edited since, or `evaluate` did not follow `train`."""
    if not one.metrics:
        return one
    files = DVCFileSystem(rev=one.rev)
    with suppress(DvcException, OSError, ValueError, LookupError, TypeError, AttributeError):
        params, lock = (load_yaml(files.read_bytes(name)) for name in (PARAMS_FILE.name, "dvc.lock"))
        stages = lock["stages"]
        if any(_is_edited(stages[name], params) for name in DECIDING):
            return replace(one, state=CHANGED, metrics={})
        of_model = [each["md5"] for name in ("train", "evaluate") for each in _files(stages[name], MODEL)]
        if of_model[0] != of_model[1] or _is_edited(stages["evaluate"], params):
            return replace(one, metrics={name: value for name, value in one.metrics.items() if name not in EVALUATED})
    return one


def _is_edited(stage: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether params are others than those that a stage in dvc.lock has run with."""
    return any(params[group] != keys for group, keys in stage["params"][PARAMS_FILE.name].items())


def _files(stage: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The entries of a path among the inputs and outputs of a stage in dvc.lock."""
    return [each for key in ("deps", "outs") for each in stage.get(key, []) if each["path"] == str(path)]


def compare_table(experiments: Sequence[Experiment]) -> pd.DataFrame:
    """A row for each experiment, with its state if any is not done, and values cut to WIDEST."""
    columns: dict[str, list[str]] = {"experiment": [one.name for one in experiments]}
    if any(one.state for one in experiments):
        columns["state"] = [one.state for one in experiments]
    for name, texts in columns_of(experiments).items():
        columns[name] = [text if len(text) <= WIDEST else text[: WIDEST - 1] + "…" for text in texts]
    return pd.DataFrame(columns)


def columns_of(experiments: Sequence[Experiment]) -> dict[str, list[str]]:
    """As text, by name: the params in which they differ, and the metrics that any of them has."""
    columns = dict[str, list[str]]()
    for name in differing([one.params for one in experiments if one.params]):
        columns[name] = [one.params.get(name, "-") for one in experiments]
    for name, form in METRICS.items():
        if any(name in one.metrics for one in experiments):
            columns[name] = [format(one.metrics[name], form) if name in one.metrics else "-" for one in experiments]
    return columns


def as_text(table: pd.DataFrame, width: int | None) -> str:
    """The table in lines of `width` characters; columns that do not fit are in blocks below."""
    named = table.set_index("experiment").rename_axis(None).rename_axis("experiment", axis="columns")
    return named.to_string(line_width=width)


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
    """A param as params.yaml has it: DVC's table turns numbers into floats, and all else into text."""
    return f"{value:.15g}" if isinstance(value, float) else WORDS.get(value, value)


@dataclass(frozen=True)
class Made(Experiment):
    """An experiment and its reports."""

    curve: list[Row]
    rows: list[dict[str, Any]]  # the curve as the page draws it
    eval: dict[str, Any]
    samples: dict[str, str]  # what it wrote, by prompt


def find_made(experiments: Sequence[Experiment]) -> list[Made]:
    """The finished experiments; of equal ones, as HEAD and a clean workspace, the last.  Raises UserError if none."""
    found = [read_made(one) for one in experiments if one.metrics]
    unequal = {json.dumps([one.curve, one.eval, one.samples, one.params]): one for one in found if one is not None}
    if not unequal:
        raise UserError("none of these has reports to show: run `dvc repro`")
    return [*unequal.values()]


def read_made(one: Experiment) -> Made | None:
    """The reports of a revision, or of the workspace; None if it has no curve. Samples only if DVC has them."""
    files = DVCFileSystem(rev=one.rev)
    texts = {name: read_report(files, name) for name in ("train.csv", "train.json", "eval.json", "details.json")}
    if not (texts["train.csv"] and texts["train.json"]):
        return None
    curve = parse_curve(texts["train.csv"], f"{REPORTS}/train.csv of {one.name}")
    try:
        train, evaluation, details = (
            json.loads(texts[name] or "{}") for name in ("train.json", "eval.json", "details.json")
        )
        if not EVALUATED & one.metrics.keys():  # these are of another model
            evaluation, details = {}, {}
        samples = {sample["prompt"]: sample["text"] for sample in details.get("samples", [])}
        rows = curve_rows(curve, tokens=train["tokens"], epochs=train["epochs"])
        return Made(**vars(one), curve=curve, rows=rows, eval=evaluation, samples=samples)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"the reports of {one.name} cannot be read ({reason}): run it again, or choose others"
        ) from None


def read_report(files: DVCFileSystem, name: str) -> str:
    """The text of a revision's report; empty if it has none."""
    try:
        text: str = files.read_text(f"{REPORTS}/{name}", encoding="utf-8")
        return text
    except (DvcException, OSError, UnicodeDecodeError):
        return ""


def write_comparison(made: Sequence[Made], path: Path) -> None:
    """Write the page."""
    drawn = {
        "charts": {"loss": comparison_chart([one.name for one in made])},
        "curve": [{"name": one.name, **row} for one in made for row in one.rows],
    }
    write_text(path, render("compare.html", drawn, **comparison_view(made)))


def comparison_view(made: Sequence[Made]) -> dict[str, Any]:
    """What the template shows."""
    columns = columns_of(made)
    prompts = dict.fromkeys(prompt for one in made for prompt in one.samples)
    return {
        "names": [one.name for one in made],
        "columns": columns,
        "marks": {name: marks(name, made) for name in columns},
        "axes": STEPS,
        "styles": run_styles(made),
        "samples": [
            (prompt, [(one.name, one.samples[prompt]) for one in made if prompt in one.samples]) for prompt in prompts
        ],
    }


def marks(name: str, made: Sequence[Made]) -> list[str]:
    """For each run "best" in this column, "greyed" if the difference from the best may be chance, or ""."""
    error_name, same = LOSSES.get(name, ("", set()))
    values = [one.metrics.get(name, math.inf) for one in made]
    params = differing([one.params for one in made])
    others = {*params, *(param.split(".")[0] for param in params)}
    is_unknown = any(name in one.metrics and error_name not in one.eval for one in made)
    if name not in LOSSES or sum(map(math.isfinite, values)) < 2 or others & same or is_unknown:
        return [""] * len(made)  # one run, runs on different texts, or one without an evaluation: none is best
    errors, best = [float(one.eval.get(error_name, 0.0)) for one in made], min(values)
    of_best = errors[values.index(best)]
    return [
        "best" if value == best else "greyed" if value - best < 2 * math.hypot(error, of_best) else ""
        for value, error in zip(values, errors, strict=True)
    ]
