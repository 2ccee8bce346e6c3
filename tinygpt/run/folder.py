"""The small files in a run's folder: its name, and how far it has come.  They are read without PyTorch."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import read_json, sha256_file, sha256_json, write_json, write_text
from tinygpt.params import PARAMS_FILE, Count, flat_params, read_record

NAME_FILE, PLAN_FILE, STATE_FILE = "name.txt", "run.json", "state.json"
LONGEST = 60  # characters of a name, at most


# ---- its name, besides the fingerprint: the first one it was trained under ----


def name_of(root: Path) -> str:
    """The name of the experiment DVC runs, or else the params that differ from the last commit; "" if none do."""
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
    """Name the run in a folder of runs/, unless it has a name."""
    if name and not (folder / NAME_FILE).exists():
        write_text(folder / NAME_FILE, name)


def read_name(folder: Path) -> str:
    """The name of the run in a folder; "" without one."""
    try:
        return _plain((folder / NAME_FILE).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def _plain(name: str) -> str:
    """The name as a file name, for loggers that make folders from names."""
    return re.sub(r"[^\w.=+-]+", "_", name)[:LONGEST].strip("._")


# ---- how far it has come ----


@dataclass(frozen=True, kw_only=True)
class Plan:
    """run.json: what `python -m tinygpt runs` needs besides the checkpoints.  Written by Checkpoints."""

    max_steps: Count
    finished: bool  # and its results are published


def read_plan(folder: Path) -> Plan | None:
    """The plan, or None without one.  Raises UserError if the file is invalid."""
    return read_record(Plan, folder / PLAN_FILE, stage="train") if (folder / PLAN_FILE).exists() else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write state.json, with checksums of itself and of the files next to it."""
    checksums = {path.name: sha256_file(path) for path in sorted(checkpoint.iterdir())}
    document = {"checksums": checksums, "state": state}
    write_json(checkpoint / STATE_FILE, document | {"checksum": sha256_json(document)})


def read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The state, and the checksum of each file.  Raises UserError if state.json is not what was written."""
    document = read_json(checkpoint / STATE_FILE, stage="train")
    checksum = document.pop("checksum", None)
    if document.keys() != {"checksums", "state"} or sha256_json(document) != checksum:
        raise UserError(f"{STATE_FILE} differs from what was written")
    return document["state"], document["checksums"]
