"""The small files of a run's folder: what people call it, and how far it has come.  Read without PyTorch."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, read_json, sha256_file, sha256_json, write_json
from tinygpt.params import PARAMS_FILE, Count, flat_params, read_record

NAME_FILE, PLAN_FILE, STATE_FILE = "name.txt", "run.json", "state.json"
LONGEST = 60  # letters of a name


# ---- its name: the first that it was trained under, next to its fingerprint ----


def name_of(root: Path) -> str:
    """The experiment that DVC runs, or the params that differ from the last commit's, or "" where none do."""
    if name := os.environ.get("DVC_EXP_NAME"):
        return _plain(name)
    command = ["git", "show", f"HEAD:./{PARAMS_FILE}"]
    try:
        then = flat_params(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)
        now = flat_params((root / PARAMS_FILE).read_bytes())
    except (OSError, subprocess.CalledProcessError, UserError):
        return ""
    return _plain(" ".join(f"{key.split('.')[1]}={value}" for key, value in now.items() if then.get(key) != value))


def keep_name(folder: Path, name: str) -> None:
    """Give the run in a folder of runs/ its name, unless it has one."""
    if name and not (folder / NAME_FILE).exists():
        with atomic_write(folder / NAME_FILE) as file:
            file.write(name)


def read_name(folder: Path) -> str:
    """The name of the run in a folder; "" without one."""
    try:
        return _plain((folder / NAME_FILE).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def _plain(name: str) -> str:
    """As a file may be called, for logs that make folders of names."""
    return re.sub(r"[^\w.=+-]+", "_", name)[:LONGEST].strip("._")


# ---- how far it has come ----


@dataclass(frozen=True, kw_only=True)
class Plan:
    """run.json: what `python -m tinygpt runs` has to know besides checkpoints.  Checkpoints writes it."""

    max_steps: Count
    finished: bool  # and its results were published


def read_plan(folder: Path) -> Plan | None:
    """None where there is none.  Raises UserError for one that was not written so."""
    return read_record(Plan, folder / PLAN_FILE, stage="train") if (folder / PLAN_FILE).exists() else None


def write_state(checkpoint: Path, state: dict[str, Any], suffix: str) -> None:
    """Write state.json, with checksums of itself and of the checkpoint's files of this suffix."""
    files = sorted(checkpoint.rglob(f"*{suffix}"))
    checksums = {path.relative_to(checkpoint).as_posix(): sha256_file(path) for path in files}
    document = {"checksums": checksums, "state": state}
    write_json(checkpoint / STATE_FILE, document | {"checksum": sha256_json(document)})


def read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The state, and the checksum of each file.  Raises UserError where state.json is not what was written."""
    document = read_json(checkpoint / STATE_FILE, stage="train")
    checksum = document.pop("checksum", None)
    if document.keys() != {"checksums", "state"} or sha256_json(document) != checksum:
        raise UserError(f"{STATE_FILE} is not what was written")
    return document["state"], document["checksums"]
