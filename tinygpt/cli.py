"""The command line: `python -m tinygpt generate | chat`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tinygpt.errors import UserError, program
from tinygpt.generate import stream
from tinygpt.generate.sampling import Sampling
from tinygpt.model import GPT, load_model
from tinygpt.params import ParamsError, from_mapping
from tinygpt.tokenizer import Tokenizer, load_tokenizer


@program
def main() -> None:
    """Run one command."""
    args = build_parser().parse_args()
    sampling = read_sampling(args)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
    model, tokenizer = load_model(args.model), load_tokenizer(args.tokenizer)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{args.model} knows {model.config.vocab_size} tokens and {args.tokenizer} {tokenizer.vocab_size}: "
            "they are of different runs; run `dvc repro`"
        )
    args.run(model, tokenizer, sampling, args)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m tinygpt", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("--prompt", default="", help="text to continue; without it a new document begins")
    generate.set_defaults(run=run_generate)
    chat = commands.add_parser("chat", help="continue what you type, line by line; an empty line starts afresh")
    chat.set_defaults(run=run_chat)
    for command in (generate, chat):
        add_options(command)
    return parser


def add_options(command: argparse.ArgumentParser) -> None:
    """What every generating command takes."""
    command.add_argument("--max-new-tokens", type=int, default=200, help="length of the answer (default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 = all")
    command.add_argument("--top-p", type=float, default=0.95, help="only this much probability (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    command.add_argument("--model", type=Path, default=Path("data/model"), help="folder (default: %(default)s)")
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """The sampling options, checked.  Raises ParamsError with all that is wrong, each by its option's name."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    try:
        return from_mapping(Sampling, {name: getattr(args, name) for name in names})
    except ParamsError as error:
        raise ParamsError([f"--{problem.replace('_', '-', 1)}" for problem in error.problems]) from None


def run_generate(model: GPT, tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Print the prompt and what follows, as it comes."""
    print(args.prompt, end="", flush=True)
    answer(model, tokenizer, args.prompt, sampling, args.max_new_tokens)


def run_chat(model: GPT, tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Answer each line with what the model makes of all lines so far."""
    print("An empty line starts afresh, Ctrl-D ends.", file=sys.stderr)
    past = ""
    while (line := read_line()) is not None:
        past = past + line + "\n" if line else ""
        if past:
            past += answer(model, tokenizer, past, sampling, args.max_new_tokens) + "\n"


def read_line() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def answer(model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling, max_new_tokens: int) -> str:
    """Print the continuation piece by piece and return it."""
    pieces = []
    for piece in stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)
