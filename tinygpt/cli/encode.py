"""`python -m tinygpt encode`: the ids of a text, and its pieces."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinygpt.tokenizer import load_tokenizer


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("text", nargs="?", help="text to encode; without it, the standard input")
    command.add_argument("--ids", action="store_true", help="print the ids alone, as `decode` reads them")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print ids, and pieces between bars: a space is a middle dot, a byte that is no character its number."""
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(sys.stdin.read() if args.text is None else args.text)
    print(*ids)
    if not args.ids:
        print("".join(f"|{visible(tokenizer.decode_bytes([i]))}" for i in ids) + "|")
        print(f"{len(ids):,} tokens, {len(tokenizer.decode_bytes(ids)):,} bytes")


def visible(raw: bytes) -> str:
    r"""Bytes as something to look at: b" a\n\xe4" -> "·a\\n\\xe4"."""
    text = raw.decode("utf-8", errors="backslashreplace").replace(" ", "·")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
