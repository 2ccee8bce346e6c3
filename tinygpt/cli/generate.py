"""`python -m tinygpt generate`: print prompts and their continuations, token by token."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tinygpt.cli.engine import Engine, open_engine, read_engine, read_proposals
from tinygpt.cli.flags import EngineOptions, ProposalOptions, TextOptions, named_as_flags, read, read_settings
from tinygpt.cli.texts import NamedPrompt, check_prompts, collect_prompts
from tinygpt.errors import UserError, printable
from tinygpt.generate import Answer, Search
from tinygpt.generate.answer import Vocabulary
from tinygpt.options import Settings, seed_after, together
from tinygpt.params import ParamsError, require

DIVIDER = "---"  # a line between two texts
MOST_WARNINGS = 10
MOST_NAMED = 10  # characters in a warning
SPECIAL = re.compile(rb"<\|.*\|>")  # how special tokens are named
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # they would control a terminal; tab and newline may pass


def generate(args: Namespace) -> None:
    """Continue the prompts."""
    texts, settings, options, proposals = read_all(args)
    prompts = collect_prompts(args)
    open_output()
    n_row = rows_together(settings.search, texts.n * len(prompts), texts.batch_size)
    engine = open_engine(options, proposals, n_row=n_row)
    with named_as_flags():
        answers = begin_all(engine, prompts, settings, n=texts.n, n_logprobs=texts.logprobs)
    n_tokens = [len(answer.prompt) for answer in answers[:: texts.n]]
    for warning in prompt_warnings(prompts, n_tokens, engine)[:MOST_WARNINGS]:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    began = time.monotonic()
    steps = engine.extend(answers, at_once=n_row, search=settings.search)
    FORMATS[texts.format](in_order([prompt.text for prompt in prompts for _ in range(texts.n)], answers, steps))
    if proposals.flag:
        print(gain(answers, time.monotonic() - began), file=sys.stderr)


def read_all(args: Namespace) -> tuple[TextOptions, Settings, EngineOptions, ProposalOptions]:
    """All options.  Raises ParamsError with all that are wrong or contradict each other."""
    checks = (read_settings, check_prompts, check_texts, read_engine, read_proposals)
    settings, _, texts, engine, proposals = together(*(partial(check, args) for check in checks))
    return texts, settings, engine, proposals


def check_texts(args: Namespace) -> TextOptions:
    """How many texts, and in which format.  Raises ParamsError where this contradicts the settings of generation."""
    many, has_beams, has_best = (isinstance(n, int | float) and n > 1 for n in (args.n, args.n_beam, args.best_of))
    rules = (
        (
            args.logprobs is None or args.format not in (None, "text"),
            f"--logprobs={args.logprobs} is not shown in text: set --format to json or jsonl",
        ),
        (
            not (many and (has_beams or has_best)),
            f"--n={args.n} prints all texts, --n-beam and --best-of only the best: use one or the other",
        ),
        (not many or args.temperature != 0, f"--n={args.n} needs --temperature above 0: at 0 all texts are the same"),
        (
            args.logprobs is None or not has_beams,
            f"--logprobs={args.logprobs} does not work with beam search: leave out --n-beam={args.n_beam}",
        ),
    )
    texts: TextOptions = together(partial(read, TextOptions, args), partial(require, *rules))[0]
    return texts


def rows_together(search: Search, n_text: int, batch_size: int) -> int:
    """How many of n_text texts are computed at a time.  A search takes one prompt at a time."""
    return min(batch_size, n_text) if search == Search() else search.n_row


def begin_all(
    engine: Engine, prompts: Sequence[NamedPrompt], settings: Settings, *, n: int, n_logprobs: int | None
) -> list[Answer]:
    """n answers for each prompt.  Raises ParamsError with what does not fit the model, and in which prompts."""
    settings.sampling.check_ids(engine.vocabulary.vocab_size)
    answers: list[Answer] = []
    problems: list[str] = []
    for prompt in prompts:
        seeds = [seed_after(settings.sampling.seed, i) for i in range(n)]
        try:
            answers += [engine.begin(prompt.text, settings, seed=seed, n_logprobs=n_logprobs) for seed in seeds]
        except UserError as error:
            problems.append(prompt.named(str(error)))
    if problems:
        raise ParamsError(problems)
    return answers


def in_order(
    prompts: Sequence[str], answers: Sequence[Answer], steps: Iterator[list[Answer]]
) -> Iterator[tuple[str, Answer]]:
    """Yield each prompt with its answer as this grows, until it is finished; later answers grow meanwhile."""
    for prompt, answer in zip(prompts, answers, strict=True):
        yield prompt, answer
        while not answer.finish_reason:
            next(steps)
            yield prompt, answer


def gain(answers: Sequence[Answer], seconds: float) -> str:
    """A line that says how much the proposals helped."""
    n_token, n_pass = sum(len(answer.ids) for answer in answers), sum(answer.n_pass for answer in answers)
    return f"{n_token / max(1, n_pass):.2f} tokens a pass of the model, {n_token / seconds:,.0f} tokens a second"


def prompt_warnings(prompts: Sequence[NamedPrompt], n_tokens: Sequence[int], engine: Engine) -> list[str]:
    """A line for each prompt longer than the context, and for each with characters that have no token."""
    found = [
        f"{prompt.name} has {n:,} tokens: only the last {engine.block_size:,} are read, the model's context"
        for prompt, n in zip(prompts, n_tokens, strict=True)
        if n > engine.block_size
    ]
    foreign = {prompt: sorted({char for char in prompt.text if ord(char) > 127}) for prompt in prompts}
    known = characters(engine.vocabulary) if any(foreign.values()) else None
    for prompt, chars in foreign.items():
        if known is not None and (unknown := [char for char in chars if char not in known]):
            named = " ".join(unknown[:MOST_NAMED]) + (" …" if len(unknown) > MOST_NAMED else "")
            found.append(f"{prompt.name} has characters that the model has not learned and reads as bytes: {named}")
    return found


def characters(vocabulary: Vocabulary) -> set[str] | None:
    """All characters of several bytes that have a token, if tokens are characters; otherwise None.

    A tokenizer of bytes has no such characters, nor has one of characters that saw only ASCII: None for both.
    """
    pieces = [vocabulary.decode_bytes([i]) for i in range(vocabulary.vocab_size)]
    texts = [piece.decode(errors="ignore") for piece in pieces if not SPECIAL.fullmatch(piece)]
    if any(len(text) > 1 for text in texts):  # part of a character became ""
        return None
    return {text for text in texts if text and ord(text) > 127} or None


# ---- how texts are printed: always UTF-8 ----


def print_text(updates: Iterator[tuple[str, Answer]]) -> None:
    """Print each prompt, and its text as it comes, with a line of dashes between two."""
    divider, n_shown = "", None  # n_shown: characters printed of the current text; None between texts
    try:
        for prompt, answer in updates:
            if n_shown is None:
                n_shown = 0
                say(divider + prompt)
                divider = f"{DIVIDER}\n"
            if len(answer.text) > n_shown:
                say(answer.text[n_shown:])
                n_shown = len(answer.text)
            if answer.finish_reason:
                n_shown = None
                say("\n")
    finally:
        if n_shown is not None:
            say("\n")


def print_lines(updates: Iterator[tuple[str, Answer]]) -> None:
    """Print a JSON object a line, each as soon as its text is finished."""
    for prompt, answer in updates:
        if answer.finish_reason:
            with uninterrupted():
                say(f"{as_json(prompt, answer)}\n")


def print_list(updates: Iterator[tuple[str, Answer]]) -> None:
    """Print the same objects as one JSON list."""
    before = "[\n"
    try:
        for prompt, answer in updates:
            if answer.finish_reason:
                with uninterrupted():  # `before` must match what was printed
                    say(before + as_json(prompt, answer))
                    before = ",\n"
    finally:
        say("[]\n" if before == "[\n" else "\n]\n")


FORMATS = {"text": print_text, "json": print_list, "jsonl": print_lines}


def as_json(prompt: str, answer: Answer) -> str:
    """A JSON object with prompt and text, and with log-probabilities if the user wants them."""
    found: dict[str, Any] = {
        "prompt": prompt,
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.n_logprobs is not None:
        found["logprobs"] = logprobs_of(answer)
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def logprobs_of(answer: Answer) -> list[dict[str, Any]]:
    """The log-probability of each of the answer's ids, in nats, and of the likeliest ids at its position.

    They are the model's own, before any option changes them. A token that is part of a character has the text U+FFFD.
    """

    def entry(i: int, logprob: float) -> dict[str, Any]:
        return {"id": i, "text": answer.tokenizer.decode_bytes([i]).decode(errors="replace"), "logprob": logprob}

    # not strict: an id that ended the text has a log-probability, but is not among the answer's ids
    taken = zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=False)
    return [entry(i, logprob) | {"top": [entry(*pair) for pair in top]} for i, logprob, top in taken]


def say(text: str) -> None:
    """Print without buffering, so that nothing is lost.  In a terminal, control characters become escapes."""
    if sys.stdout.isatty():
        text = CONTROLS.sub(lambda found: printable(found[0]), text)
    print(text, end="", flush=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Make Ctrl-C wait for the end of the block."""
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


def open_output() -> None:
    """Print UTF-8 in every locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
