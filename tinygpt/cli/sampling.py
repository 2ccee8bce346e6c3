"""The options of how a text is chosen, for all commands that write."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tinygpt.generate import Sampling, Search
from tinygpt.params import Count, ParamsError, from_mapping, require

DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # where tokens are drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """How much to write."""

    max_new_tokens: Count = 200


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that can be asked of a text."""

    sampling: Sampling
    search: Search
    length: Length


NAMES = [field.name for cls in (Length, Sampling, Search) for field in dataclasses.fields(cls)]

# Field of Sampling or Search -> type and help.  docs/generation.md tells more of each.
NUMBERS: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, f"length of the text (default: {Length().max_new_tokens})"),
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


def read_settings(args: argparse.Namespace) -> Settings:
    """The options, checked.  Raises ParamsError with all that is wrong, each by its option's name."""
    with named_as_options():
        return make_settings(given_settings(args))


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those that the user gave, by name."""
    return {name: value for name in NAMES if (value := getattr(args, name)) is not None}


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Settings of some values, others as the command line has them.  Raises ParamsError with all that is wrong."""
    drawn = given.get("n_beam", 1) == 1

    def part(cls: type, defaults: Mapping[str, Any]) -> Callable[[], Any]:
        values = {field.name: field.default for field in dataclasses.fields(cls)} | {**defaults}
        return lambda: from_mapping(cls, values | {name: given[name] for name in values if name in given})

    made = together(part(Sampling, DEFAULTS if drawn else {"temperature": 0.0}), part(Search, {}), part(Length, {}))
    settings = Settings(*made)
    least, most = settings.sampling.min_new_tokens, settings.length.max_new_tokens
    together(
        lambda: settings.search.check(settings.sampling),
        lambda: require((least <= most, f"min_new_tokens={least} is more than max_new_tokens={most}")),
    )
    return settings


def together(*checks: Callable[[], Any]) -> list[Any]:
    """What several checks return.  Raises one ParamsError with what all of them find."""
    found: list[Any] = []
    problems: list[str] = []
    for check in checks:
        try:
            found.append(check())
        except ParamsError as error:
            problems += error.problems
    if problems:
        raise ParamsError(problems)
    return found


def values_of(settings: Settings) -> dict[str, Any]:
    """Each by its name."""
    return {name: value for part in vars(settings).values() for name, value in vars(part).items()}


@contextmanager
def named_as_options(names: Iterable[str] = NAMES) -> Iterator[None]:
    """Tell mistakes by the names of options: --top-p for top_p."""
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
