"""`python -m tinygpt promote`: the trained model becomes the one that training can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.cli.model import add_folder_options
from tinygpt.export.base import use_of, write_base
from tinygpt.model.weights import load_pair, model_tensors


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_folder_options(command)
    command.add_argument("--to", type=Path, default=Path("data/base"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the base and tell what to do next."""
    model, tokenizer = load_pair(args.model, args.tokenizer)
    write_base(args.to, model.config, model_tensors(model), tokenizer)
    print(f"{args.to}: {model.n_params():,} weights; {use_of(args.to)}")
