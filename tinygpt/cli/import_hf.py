"""`python -m tinygpt import-hf`: a folder of transformers becomes the model that training can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.cli.torch_engine import read_hf_folder
from tinygpt.export.base import use_of, write_base


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("folder", type=Path, help="with config.json, model.safetensors and tokenizer.json")
    command.add_argument("--to", type=Path, default=Path("data/base"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the base and tell what to do next."""
    config, tensors, tokenizer = read_hf_folder(args.folder)
    write_base(args.to, config, tensors, tokenizer)
    n_weights = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.to}: {n_weights:,} weights; {use_of(args.to)}")
