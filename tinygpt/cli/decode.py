"""`python -m tinygpt decode`: the text of ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.tokenizer import load_tokenizer


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("ids", nargs="*", help="ids to decode; without them, the standard input")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the text, byte for byte."""
    words = [word for arg in args.ids or [sys.stdin.read()] for word in arg.replace(",", " ").split()]
    if odd := [word for word in words if not word.isdecimal()]:
        raise UserError(f"{odd[0]!r} is no id: give whole numbers, such as `decode 72 101`")
    try:
        raw = load_tokenizer(args.tokenizer).decode_bytes(map(int, words))
    except ValueError as error:
        raise UserError(str(error)) from None
    sys.stdout.buffer.write(raw)
