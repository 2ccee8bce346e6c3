"""The options of all commands that write with a model, and what they make of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.generate import Sampling, stream
from tinygpt.model.quantize import KINDS, quantize
from tinygpt.model.weights import load_pair
from tinygpt.params import ParamsError, from_mapping


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which model, and how it chooses."""
    command.add_argument("--max-new-tokens", type=int, default=200, help="length of the answer (default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 = all")
    command.add_argument("--top-p", type=float, default=0.95, help="only this much probability (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
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
        self.sampling, self.max_new_tokens = _read_sampling(args), args.max_new_tokens
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
        self.model, self.tokenizer = load_pair(args.model, args.tokenizer)
        if args.quantize:
            quantize(self.model, args.quantize)

    def answer(self, prompt: str) -> str:
        """Print what follows the prompt piece by piece and return it."""
        pieces = []
        for piece in stream(
            self.model, self.tokenizer, prompt, max_new_tokens=self.max_new_tokens, sampling=self.sampling
        ):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)


def _read_sampling(args: argparse.Namespace) -> Sampling:
    """The sampling options, checked.  Raises ParamsError with all that is wrong, each by its option's name."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    try:
        return from_mapping(Sampling, {name: getattr(args, name) for name in names})
    except ParamsError as error:
        raise ParamsError([f"--{problem.replace('_', '-', 1)}" for problem in error.problems]) from None
