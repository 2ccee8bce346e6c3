"""The options of how a text is chosen, for all commands that write."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinygpt.generate import Sampling, Search
from tinygpt.params import ParamsError, from_mapping

DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # where tokens are drawn

# Field of Sampling or Search -> type and help.  docs/generation.md tells more of each.
NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, f"0 takes the likeliest (default: {DEFAULTS['temperature']}, with --n-beam 0)"),
    "top_k": (int, "only the k likeliest tokens; 0 = all"),
    "top_p": (float, f"only this much probability (default: {DEFAULTS['top_p']}, with --n-beam 1)"),
    "min_p": (float, "only tokens with this share of the likeliest one's probability"),
    "typical_p": (float, "only this much probability, of tokens as surprising as is usual"),
    "repetition_penalty": (float, "above 1: less of what prompt and text have"),
    "frequency_penalty": (float, "above 0: less of what the text has, each time more"),
    "presence_penalty": (float, "above 0: less of what the text has"),
    "no_repeat_ngram_size": (int, "no n tokens come twice"),
    "min_new_tokens": (int, "no end before so many tokens"),
    "seed": (int, "the same seed gives the same text (default: 0)"),
    "n_beam": (int, "beam search: the likeliest text, by so many side by side"),
    "length_penalty": (float, "of beams: above 0 favours long texts, below 0 short ones (default: 1)"),
    "best_of": (int, "draw so many texts, take the likeliest"),
}


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """All of them; none has a default here, so that contradictions are those of the user."""
    for name, (kind, help) in NUMBERS.items():
        command.add_argument(flag(name), type=kind, help=help)
    command.add_argument("--early-stopping", choices=["false", "true", "never"], help="when beam search ends")
    command.add_argument("--logit-bias", type=_bias, action="append", metavar="ID=BIAS", help="add to a token's logit")
    command.add_argument("--banned-ids", type=int, nargs="+", metavar="ID", help="tokens that never come")
    command.add_argument("--ignore-eos", action="store_true", default=None, help="go on at the end of a text")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    command.add_argument("--stop-ids", type=int, nargs="+", metavar="ID", help="end before these tokens")
    command.add_argument(
        "--when-full", choices=["slide", "stop"], help="a full context forgets its older half (slide), or ends the text"
    )


def read_sampling(args: argparse.Namespace) -> tuple[Sampling, Search]:
    """The options, checked.  Raises ParamsError with all that is wrong, each by its option's name."""
    drawn = args.n_beam in (None, 1)
    problems: list[str] = []
    found: list[Any] = []
    for cls, defaults in ((Search, {}), (Sampling, DEFAULTS if drawn else {"temperature": 0.0})):
        values = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {name: value for name in values if (value := getattr(args, name)) is not None}
        try:
            found.append(from_mapping(cls, values | defaults | given))
        except ParamsError as error:
            problems += error.problems
    with named_as_options():
        if problems:
            raise ParamsError(problems)
        search, sampling = found
        search.check(sampling)
    return sampling, search


@contextmanager
def named_as_options() -> Iterator[None]:
    """Tell mistakes by the names of options: --top-p for top_p."""
    names = [field.name for cls in (Sampling, Search) for field in dataclasses.fields(cls)] + ["max_new_tokens"]
    # a name that is a word, too, is one only before its value
    pattern = "|".join(rf"\b{name}\b" if "_" in name else rf"\b{name}(?==)" for name in names)
    try:
        yield
    except ParamsError as error:
        raise ParamsError([re.sub(pattern, lambda found: flag(found[0]), each) for each in error.problems]) from None


def flag(name: str) -> str:
    """top_p -> --top-p"""
    return f"--{name.replace('_', '-')}"


def _bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"(\d+)=([-+.\deE]+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=BIAS, such as 17=-2.5")
    return int(found[1]), float(found[2])
