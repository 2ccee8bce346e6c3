"""`python -m tinygpt promote`: the trained model becomes the one that training can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.export.base import write_base
from tinygpt.model import load_model
from tinygpt.model.weights import model_tensors
from tinygpt.tokenizer import load_tokenizer


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--model", type=Path, default=Path("data/model"), help="folder (default: %(default)s)")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")
    command.add_argument("--to", type=Path, default=Path("data/base"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the base and tell what to do next."""
    model = load_model(args.model)
    write_base(args.to, model.config, model_tensors(model), load_tokenizer(args.tokenizer))
    print(
        f"{args.to}: {model.n_params():,} weights; `python -m tinygpt preset base` sets params.yaml to go on from them"
    )
