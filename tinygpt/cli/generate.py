"""`python -m tinygpt generate`: print a prompt and what follows, as it comes."""

from __future__ import annotations

import argparse

from tinygpt.cli.model import Writer, add_model_options


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--prompt", default="", help="text to continue; without it a new document begins")
    add_model_options(command)


def run(args: argparse.Namespace) -> None:
    """Continue the prompt."""
    Writer(args).answer(args.prompt, echo=args.prompt)
