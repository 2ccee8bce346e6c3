"""The small files of a run's folder, which say how far it has come: read without PyTorch, and as they were written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import read_json, sha256_file, sha256_json, write_json
from tinygpt.params import Count, read_record

PLAN_FILE, STATE_FILE = "run.json", "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """run.json: what `python -m tinygpt runs` has to know besides checkpoints."""

    max_steps: Count
    finished: bool  # and its results were published


def write_plan(folder: Path, plan: Plan) -> None:
    """Into the folder of a run."""
    write_json(folder / PLAN_FILE, dataclasses.asdict(plan))


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
