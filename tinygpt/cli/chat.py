"""`python -m tinygpt chat`: answer each line with what the model makes of all lines so far."""

from __future__ import annotations

import argparse
import sys

from tinygpt.cli.model import Writer, add_model_options

add_options = add_model_options


def run(args: argparse.Namespace) -> None:
    """Answer until the input ends."""
    writer = Writer(args)
    print("An empty line starts afresh, Ctrl-D ends.", file=sys.stderr)
    past = ""
    while (line := _read_line()) is not None:
        past = past + line + "\n" if line else ""
        if past:
            past += writer.answer(past) + "\n"


def _read_line() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
