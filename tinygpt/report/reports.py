"""Read and check what the stages have written about a run, and what git keeps of an earlier run."""

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import must_exist, read_file, read_json
from tinygpt.params import PARAMS_FILE, flat_params
from tinygpt.paths import REPORTS

COLUMNS = ["step", "train_loss", "val_loss", "lr", "grad_norm"]
AGAIN = "run `dvc repro train`"
SAMPLE = re.compile(r"^## Step (\d+)\n\n(`{3,})text\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)
STAGES = {"clean": "clean", "train": "train", "eval": "evaluate", "export": "export", "details": "evaluate"}
TEXT = {"download", "clean"}  # groups that decide the text
TOKENS = TEXT | {"tokenizer"}
OF_VAL_LOSS = TOKENS | {"train.eval_tokens"}  # groups and params in which runs must agree to compare it
MOST_COMMITS = 20  # that are searched for an earlier run

Row = dict[str, float | None]


def read_reports(root: Path) -> dict[str, Any]:
    """What the stages of a project have written: the JSON files, "curve", "norms", "samples", and "params" as text.

    Raises UserError naming the stage of one that is missing or damaged.
    """
    folder = root / REPORTS
    for name in ("train_norms.csv", "train_samples.md"):
        must_exist(folder / name, stage="train")
    return {name: read_json(folder / f"{name}.json", stage=stage) for name, stage in STAGES.items()} | {
        "curve": read_curve(folder),
        "norms": read_norms(folder),
        "samples": read_samples(folder),
        "params": flat_params((root / PARAMS_FILE).read_bytes()),
    }


def read_curve(folder: Path) -> list[Row]:
    """The curve of a run, in reports/ or its folder in runs/.  Raises UserError, also before the first evaluation."""
    path = must_exist(folder / "train.csv", stage="train")
    return parse_curve(_text(path), str(path))


def read_norms(folder: Path) -> list[Row]:
    """The norm of each part's gradient, by the step of each evaluation; empty before the first one."""
    path = folder / "train_norms.csv"
    return parse_rows(_text(path), str(path)) if path.exists() else []


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The "step" and the "text" of the sample of each evaluation; empty before the first one."""
    path = folder / "train_samples.md"
    found = SAMPLE.findall(_text(path)) if path.exists() else []
    return [{"step": int(step), "text": text} for step, _, text in found]


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8", errors="replace")
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): {AGAIN}") from None


def parse_curve(text: str, name: str) -> list[Row]:
    """The rows of a train.csv, with at least one validation loss.  Raises UserError naming the file and the line."""
    rows = parse_rows(text, name, COLUMNS)
    if all(row["val_loss"] is None for row in rows):
        raise UserError(f"{name} has no validation loss: {AGAIN}")
    return rows


def parse_rows(text: str, name: str, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV of numbers, None where a field is empty.  (pandas would take longer than the page.)

    Without `columns`, they must be "step" and the parts of a model.
    """
    header, *lines = text.split("\n")
    found = header.split(",")
    parts = ["step", *dict.fromkeys(filter(str.isidentifier, found[1:]))]
    if len(lines) < 2 or found != [*(columns or parts)] or len(parts) < 2:
        shown = ", ".join(columns or ["step", "one for each part"])
        raise UserError(f"{name} must have the columns {shown} and at least one row: {AGAIN}")
    rows, before = list[Row](), -math.inf
    try:
        for line in lines[:-1]:
            fields = zip(found, line.split(","), strict=True)
            row: Row = {name: float(field) if field else None for name, field in fields}
            step, numbers = row["step"], [value for value in row.values() if value is not None]
            if step is None or step <= before or not all(map(math.isfinite, numbers)):
                raise ValueError("no step after the one before, or a number that is not finite")
            rows.append(row)
            before = step
        if lines[-1]:
            raise ValueError("its last line is cut")
    except ValueError:
        raise UserError(f"{name} is cut off or damaged in line {len(rows) + 2}: {AGAIN}") from None
    return rows


def differing(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """The params, by "group.key", that differ between runs, of which all params are given."""
    names = dict.fromkeys(name for params in runs for name in params)
    return [name for name in names if len({params.get(name) for params in runs}) > 1]


@dataclass(frozen=True)
class Earlier:
    """What a commit keeps of its run."""

    commit: str
    eval: dict[str, Any]  # as in reports/eval.json, with the val_loss of training
    params: dict[str, str]  # by "group.key", like those of the present run


def find_earlier(root: Path, evaluation: dict[str, Any]) -> Earlier | None:
    """The newest commit whose evaluation differs from that of the present run.

    So it stays the same when the present run is committed. None if no commit has an evaluation in this version's form,
    or without git.
    """
    metrics = f"{REPORTS.as_posix()}/metrics"  # in git, unlike the whole reports
    commits = _git(root, "log", "--format=%H", f"-n{MOST_COMMITS}", "--", f"{metrics}/eval.json")
    for commit in commits.split():
        try:
            texts = (_git(root, "show", f"{commit}:./{metrics}/{name}.json") for name in ("eval", "train"))
            found, train = map(json.loads, texts)
            if found["eval_loss"] == evaluation["loss"]:
                continue
            params = flat_params(_git(root, "show", f"{commit}:./{PARAMS_FILE}").encode())
            of_train = {"split": params["evaluate.split"], "val_loss": float(train["val_loss"])}
            return Earlier(commit[:9], found | of_train | _derived(found), params)
        except (UserError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
            continue
    return None


def _derived(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers of reports/eval.json that are not among the metrics, as all are in proportion to the loss."""
    loss, bpb, tokens = found["eval_loss"], found["bpb"], found["eval_tokens"]
    loss_error = found["bpb_error"] * loss / bpb
    return {
        "loss_error": loss_error,
        "ppl_error": found["ppl"] * loss_error,
        "tokens": tokens,
        "bytes": round(loss / math.log(2) * tokens / bpb),
    }


def _git(root: Path, *command: str) -> str:
    """What git prints; nothing if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, check=True)
        return done.stdout.decode("utf-8", errors="replace")
    except (OSError, subprocess.CalledProcessError):
        return ""
