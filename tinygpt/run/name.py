"""What people call a run, next to its fingerprint: the first name that it was trained under stays its name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.files import atomic_write
from tinygpt.params import PARAMS_FILE, flat_params

NAME_FILE = "name.txt"
LONGEST = 60  # letters


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
