"""Find the command and run it.  Only its own file is imported, so that those without a model start at once."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

from tinygpt.errors import program

# Name -> the file that has `add_options` and `run` for it, and what it does.
COMMANDS = {
    "generate": ("generate", "continue a prompt, or many"),
    "chat": ("chat", "continue what you type, line by line"),
    "serve": ("serve", "serve models by OpenAI's API, with a page to play with them"),
    "encode": ("encode", "show the ids and pieces of a text"),
    "decode": ("decode", "show the text of ids"),
    "attention": ("attention", "draw where each head of the model looks in a text"),
    "import-hf": ("import_hf", "take a folder of transformers as the model that training starts from"),
    "promote": ("promote", "take the trained model as the one that training starts from"),
    "profile": ("profile", "tell what the run of params.yaml will cost, and whether it fits"),
    "preset": ("preset", "put the values of a preset into params.yaml, or list the presets"),
    "runs": ("runs", "list what training keeps in runs/, and remove what is finished"),
    "compare": ("compare", "show DVC's experiments side by side, as a table and a picture"),
    "tokenizer-report": ("tokenizer_report", "tell how well the tokenizer fits the text, as a table and a plot"),
}


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with arguments in one line."""

    def parse_known_args(self, *args: Any) -> tuple[Any, list[str]]:  # type: ignore[override]  # it has overloads
        """Arguments -> what they mean, and nothing that is unknown: that is an error, with the nearest name."""
        found, unknown = super().parse_known_args(*args)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]!r}" + (f" (did you mean {near[0]}?)" if near else ""))
        return found, unknown

    def error(self, message: str) -> Never:
        """Leave with status 2."""
        self.exit(2, f"error: {message}: see {self.prog} --help\n")


@program
def main() -> None:
    """Run one command."""
    with leaving_at_once():
        args = build_parser(sys.argv[1:]).parse_args()
    args.run(args)


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """All commands, and the options of the one that `argv` names."""
    parser = Parser(prog="python -m tinygpt", description="Use what the pipeline has made.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (file, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if name in argv[:1]:
            module = importlib.import_module(f"tinygpt.cli.{file}")
            module.add_options(command)
            command.set_defaults(run=module.run)
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
