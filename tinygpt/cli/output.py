"""Texts as they are printed: for people, or as JSON for programs.  Always UTF-8."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tinygpt.generate import Answer
from tinygpt.generate.answer import Vocabulary
from tinygpt.params import require

DIVIDER = "---"  # a line between two texts


class Output(Protocol):
    """Prints answers, one after the other."""

    def begin(self, prompt: str) -> None:
        """The next answer comes."""

    def show(self, answer: Answer) -> None:
        """It has a token more."""

    def end(self, prompt: str, answer: Answer) -> None:
        """It is whole."""

    def close(self) -> None:
        """No more comes, perhaps because of Ctrl-C."""


class TextOutput:
    """Prompt and text as they come, a line of dashes between two."""

    def __init__(self, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._n_shown: int | None = None  # characters of the running text; None between two
        self._is_first = True

    def begin(self, prompt: str) -> None:
        """Print the prompt."""
        say(prompt if self._is_first else f"{DIVIDER}\n{prompt}")
        self._n_shown, self._is_first = 0, False

    def show(self, answer: Answer) -> None:
        """Print what is new."""
        if len(answer.text) > (self._n_shown or 0):
            say(answer.text[self._n_shown :])
            self._n_shown = len(answer.text)

    def end(self, prompt: str, answer: Answer) -> None:
        """Print the rest."""
        self.show(answer)
        self.close()

    def close(self) -> None:
        """End the line."""
        if self._n_shown is not None:
            self._n_shown = None
            say("\n")


class JsonLines:
    """An object a line, each as soon as its text is whole."""

    first, between, after, last, nothing = "", "", "\n", "", ""

    def __init__(self, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._vocabulary, self._with_logprobs, self._has_begun = vocabulary, with_logprobs, False

    def begin(self, prompt: str) -> None:
        """Nothing is shown before a text is whole."""

    def show(self, answer: Answer) -> None:
        """Nothing is shown before a text is whole."""

    def end(self, prompt: str, answer: Answer) -> None:
        """Print the object."""
        found: dict[str, Any] = {
            "prompt": prompt,
            "text": answer.text,
            "ids": answer.ids,
            "finish_reason": answer.finish_reason,
        }
        if self._with_logprobs:
            found["logprobs"] = logprobs_of(answer, self._vocabulary)
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        with uninterrupted():  # `close` must know what was written
            say(f"{self.between if self._has_begun else self.first}{text}{self.after}")
            self._has_begun = True

    def close(self) -> None:
        """End what was begun, or say that there is nothing."""
        say(self.last if self._has_begun else self.nothing)


class JsonList(JsonLines):
    """The same objects as one list."""

    first, between, after, last, nothing = "[\n", ",\n", "", "\n]\n", "[]\n"


FORMATS: dict[str, type[TextOutput] | type[JsonLines]] = {"text": TextOutput, "json": JsonList, "jsonl": JsonLines}


def add_output_options(command: argparse.ArgumentParser) -> None:
    """How texts are printed."""
    command.add_argument("--format", choices=list(FORMATS), default="text", help="default: %(default)s")
    command.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="of each token, and of the N likeliest in its place; for json and jsonl",
    )


def check_output(args: argparse.Namespace) -> None:
    """Raises ParamsError with what contradicts each other."""
    require(
        (args.logprobs is None or args.logprobs >= 0, f"--logprobs={args.logprobs} must be within [0, inf)"),
        (
            args.logprobs is None or args.format != "text",
            f"--logprobs={args.logprobs} is not shown in text: it needs --format json or jsonl",
        ),
        (
            args.logprobs is None or args.n_beam in (None, 1),
            f"--logprobs={args.logprobs} is of texts that go one way, not of --n-beam={args.n_beam}",
        ),
    )


def logprobs_of(answer: Answer, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """For each of the answer's ids its log-probability, in nats, and those of the likeliest in its place.

    They are the model's, before options change them. A token that is part of a character has U+FFFD as its text.
    """

    def entry(i: int, logprob: float) -> dict[str, Any]:
        return {"id": i, "text": vocabulary.decode_bytes([i]).decode(errors="replace"), "logprob": logprob}

    # not strict: the id that ended the text is not among its ids
    taken = zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=False)
    return [entry(i, logprob) | {"top": [entry(*pair) for pair in top]} for i, logprob, top in taken]


def say(text: str) -> None:
    """Print at once, all of it: what is written stays, whatever comes."""
    print(text, end="", flush=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    before, caught = signal.getsignal(signal.SIGINT), list[int]()
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt


def warn(text: str) -> None:
    """Tell people, not programs."""
    print(f"warning: {text}", file=sys.stderr)


def open_output() -> None:
    """Print UTF-8 whatever the language of the machine."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
