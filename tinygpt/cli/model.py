"""Where commands that look into a model find it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_folder_options(command: argparse.ArgumentParser) -> None:
    """Where the model and its tokenizer are."""
    command.add_argument("--model", type=Path, default=Path("data/model"), help="folder (default: %(default)s)")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")
