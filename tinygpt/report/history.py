"""The run before: the newest commit whose evaluation is another than that of the run at hand.

So it stays the same when the run at hand is committed.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.params import PARAMS_FILE
from tinygpt.paths import REPORTS

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
    path = (REPORTS / "eval.json").as_posix()
    commits = _git(root, "log", "--format=%H", f"-n{MOST_COMMITS}", "--", path) or ""
    for commit in commits.split():
        try:
            found = json.loads(_git(root, "show", f"{commit}:./{path}") or "null")
            if not isinstance(found, dict) or found.get("loss") == evaluation["loss"]:
                continue
            train = json.loads(_git(root, "show", f"{commit}:./{(REPORTS / 'train.json').as_posix()}") or "null")
            numbers = [found["loss"], found["bpb"], found["bpb_error"], found["ppl"], train["val_loss"]]
            if all(isinstance(number, float) for number in numbers):
                params = _git(root, "show", f"{commit}:./{PARAMS_FILE}") or ""
                return Earlier(commit[:9], train, found, params)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def _git(root: Path, *command: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, check=True)
        return done.stdout.decode("utf-8", errors="replace")
    except (OSError, subprocess.CalledProcessError):
        return None
