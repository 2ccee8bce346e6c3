"""The options of all commands that write with a model, and what they make of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.cli.sampling import add_sampling_options, named_as_options, read_sampling
from tinygpt.errors import UserError
from tinygpt.generate import stream
from tinygpt.model.quantize import KINDS, quantize
from tinygpt.model.weights import load_pair


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which model, and how it chooses."""
    command.add_argument("--max-new-tokens", type=int, default=200, help="length of the answer (default: %(default)s)")
    add_sampling_options(command)
    command.add_argument(
        "--quantize", choices=list(KINDS), help="weights of one byte or half of one: less memory, faster"
    )
    add_folder_options(command)


def add_folder_options(command: argparse.ArgumentParser) -> None:
    """Where the model and its tokenizer are."""
    command.add_argument("--model", type=Path, default=Path("data/model"), help="folder (default: %(default)s)")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")


class Writer:
    """A model, its tokenizer and how to sample, as the options say."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises UserError with all that is wrong with the options or the folders."""
        (self.sampling, self.search), self.max_new_tokens = read_sampling(args), args.max_new_tokens
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
        self.model, self.tokenizer = load_pair(args.model, args.tokenizer)
        if args.quantize:
            quantize(self.model, args.quantize)

    def answer(self, prompt: str, *, echo: str = "") -> str:
        """Print `echo` and what follows the prompt, piece by piece, and return what follows."""
        with named_as_options():
            pieces = stream(
                self.model,
                self.tokenizer,
                prompt,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                search=self.search,
            )
        print(echo, end="", flush=True)
        text = ""
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
        print()
        return text
