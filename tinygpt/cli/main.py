"""Find the command and run it.  Its file is imported only once its flags are read, which need no PyTorch."""

from __future__ import annotations

import importlib
import os
import signal
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

from tinygpt.cli import flags
from tinygpt.errors import program

# Name -> the file with its function, and what it does. `flags` has a function of the same name for what it takes.
COMMANDS = {
    "generate": ("generate", "continue a prompt, or many"),
    "chat": ("chat", "continue what you type, line by line"),
    "serve": ("models", "serve models by OpenAI's API, with a page to play with them"),
    "encode": ("pieces", "show the ids and pieces of a text"),
    "decode": ("pieces", "show the text of ids"),
    "attention": ("models", "draw where each head of the model attends to in a text"),
    "import-hf": ("models", "take a folder of transformers as the model that training starts from"),
    "promote": ("models", "take the trained model as the one that training starts from"),
    "profile": ("models", "say what the run of params.yaml will cost, and whether it fits"),
    "preset": ("presets", "put the values of a preset into params.yaml, or list the presets"),
    "runs": ("runs", "list what training keeps in runs/, and remove what is finished"),
    "compare": ("runs", "show DVC's experiments side by side, as a table and a picture"),
    "tokenizer-report": ("pieces", "say how well the tokenizer fits the text, as a table and a plot"),
}


class Parser(ArgumentParser):
    """Says what is wrong with arguments in one line."""

    def parse_known_args(self, *args: Any) -> tuple[Any, list[str]]:  # type: ignore[override]  # it has overloads
        """Arguments -> what they mean, and nothing that is unknown: that is an error, with the nearest name."""
        found, unknown = super().parse_known_args(*args)
        if unknown:
            near = flags.nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}{near}")
        return found, unknown

    def error(self, message: str) -> Never:
        """Leave with status 2."""
        self.exit(2, f"error: {message}: see {self.prog} --help\n")


@program
def main() -> None:
    """Run one command."""
    with leaving_at_once():
        args = build_parser().parse_args()
        module = importlib.import_module(f"tinygpt.cli.{COMMANDS[args.command][0]}")
    getattr(module, args.command.replace("-", "_"))(args)


def build_parser() -> ArgumentParser:
    """All commands with their flags."""
    parser = Parser(prog="python -m tinygpt", description="Use what the pipeline has made.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        getattr(flags, name.replace("-", "_"))(command)
    return parser


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the program: while it imports PyTorch, that would take the exception for a failure of its own."""
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        if heeds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
