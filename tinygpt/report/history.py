"""The run before: the newest commit whose evaluation is another than that of the run at hand.

So it stays the same when the run at hand is committed.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.files import parse_yaml
from tinygpt.params import PARAMS_FILE
from tinygpt.paths import REPORTS

METRICS = REPORTS / "metrics"  # in git, as the whole reports are not
MOST_COMMITS = 20  # looked through


@dataclass(frozen=True)
class Earlier:
    """What a commit has of its run."""

    commit: str
    train: dict[str, Any]
    eval: dict[str, Any]
    params: str  # the text of params.yaml


def find_earlier(root: Path, evaluation: dict[str, Any]) -> Earlier | None:
    """The newest one of another evaluation; None without one, without git, or where it is not as this version's."""
    path = (METRICS / "eval.json").as_posix()
    commits = _git(root, "log", "--format=%H", f"-n{MOST_COMMITS}", "--", path) or ""
    for commit in commits.split():
        try:
            found, train = (_metrics(root, commit, name) for name in ("eval", "train"))
            if found["eval_loss"] == evaluation["loss"]:
                continue
            params = _git(root, "show", f"{commit}:./{PARAMS_FILE}") or ""
            split = parse_yaml(params.encode())["evaluate"]["split"]
            return Earlier(
                commit[:9], {"val_loss": float(train["val_loss"])}, {"split": split, **_whole(found)}, params
            )
        except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
            continue
    return None


def _metrics(root: Path, commit: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_git(root, "show", f"{commit}:./{(METRICS / name).as_posix()}.json") or "null")
    return found


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """What reports/eval.json had, of which git keeps these metrics: all that is in proportion to the loss."""
    loss, bpb, error, ppl, tokens = (found[name] for name in ("eval_loss", "bpb", "bpb_error", "ppl", "eval_tokens"))
    loss_error = error * loss / bpb
    return {
        "loss": loss,
        "loss_error": loss_error,
        "ppl": ppl,
        "ppl_error": ppl * loss_error,
        "bpb": bpb,
        "bpb_error": error,
        "tokens": tokens,
        "bytes": round(loss / math.log(2) * tokens / bpb),
    }


def _git(root: Path, *command: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, check=True)
        return done.stdout.decode("utf-8", errors="replace")
    except (OSError, subprocess.CalledProcessError):
        return None
