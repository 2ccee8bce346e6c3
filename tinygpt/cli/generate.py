"""`python -m tinygpt generate`: print prompts and their continuations, token by token."""

import io
import json
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tinygpt.cli.engine import Engine, open_engine, read_engine
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
    n_row = rows_together(settings, texts.n * len(prompts), texts.batch_size)
    engine = open_engine(options, proposals, n_row=n_row)
    with named_as_flags():
        answers = begin_all(engine, prompts, settings, n=texts.n, n_logprobs=texts.logprobs)
    n_tokens = [len(answer.prompt) for answer in answers[:: texts.n]]
    for warning in prompt_warnings(prompts, n_tokens, engine)[:MOST_WARNINGS]:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    began = time.monotonic()
    pairs = zip([prompt.text for prompt in prompts for _ in range(texts.n)], answers, strict=True)
    FORMATS[texts.format](pairs, engine.extend(answers, at_once=n_row, search=settings))
    if proposals.flag:
        print(gain(answers, time.monotonic() - began), file=sys.stderr)


def read_all(args: Namespace) -> tuple[TextOptions, Settings, EngineOptions, ProposalOptions]:
    """All options.  Raises ParamsError with all that are wrong or, if none is, with all that contradict each other."""
    readers = (read_settings, check_prompts, partial(read, TextOptions), read_engine, partial(read, ProposalOptions))
    settings, _, texts, engine, proposals = together(*(partial(reader, args) for reader in readers))
    n, logprobs, flag = texts.n, texts.logprobs, proposals.flag
    require(
        (logprobs is None or texts.format != "text", "--logprobs are not shown in text: set --format to json or jsonl"),
        (logprobs is None or settings.n_beam == 1, "--logprobs do not work with --n-beam: use one or the other"),
        (n == 1 or settings.n_row == 1, f"--n={n} prints all texts, --n-beam and --best-of the best: use one of them"),
        (n == 1 or settings.temperature > 0, f"--n={n} needs --temperature above 0: at 0 all texts are the same"),
        (not proposals.draft or not proposals.prompt_lookup, "--draft and --prompt-lookup: give only one of them"),
        (flag is not None or args.n_draft is None, "--n-draft needs --draft or --prompt-lookup"),
        (proposals.prompt_lookup or args.ngram is None, "--ngram needs --prompt-lookup"),
        (flag is None or settings.n_row == 1, f"{flag} does not work with --n-beam or --best-of: use one of them"),
    )
    return texts, settings, engine, proposals


def rows_together(search: Search, n_text: int, batch_size: int) -> int:
    """How many of n_text texts are computed at a time.  A search takes one prompt at a time."""
    return min(batch_size, n_text) if search.n_row == 1 else search.n_row


def begin_all(
    engine: Engine, prompts: Sequence[NamedPrompt], settings: Settings, *, n: int, n_logprobs: int | None
) -> list[Answer]:
    """n answers for each prompt.  Raises ParamsError with what does not fit the model, and in which prompts."""
    settings.check_ids(engine.vocabulary.vocab_size)
    answers: list[Answer] = []
    problems: list[str] = []
    for prompt in prompts:
        seeds = [seed_after(settings.seed, i) for i in range(n)]
        try:
            answers += [engine.begin(prompt.text, settings, seed=seed, n_logprobs=n_logprobs) for seed in seeds]
        except UserError as error:
            problems.append(prompt.named(str(error)))
    if problems:
        raise ParamsError(problems)
    return answers


def gain(answers: Sequence[Answer], seconds: float) -> str:
    """A line that says how much the proposals helped."""
    n_token, n_pass = sum(len(answer.ids) for answer in answers), sum(answer.n_pass for answer in answers)
    return f"{n_token / max(1, n_pass):.2f} tokens a pass of the model, {n_token / seconds:,.0f} tokens a second"


def prompt_warnings(prompts: Sequence[NamedPrompt], n_tokens: Sequence[int], engine: Engine) -> list[str]:
    """A line for each prompt longer than the context, and one for all characters that have no token."""
    found = [
        f"{prompt.name} has {n:,} tokens: only the last {engine.block_size:,} are read, the model's context"
        for prompt, n in zip(prompts, n_tokens, strict=True)
        if n > engine.block_size
    ]
    foreign = {char for prompt in prompts for char in prompt.text if not char.isascii()}
    if foreign and (unknown := without_token(foreign, engine.vocabulary)):
        named = " ".join(unknown[:MOST_NAMED]) + (" …" if len(unknown) > MOST_NAMED else "")
        found.append(f"characters that the model has not learned and reads as bytes: {named}")
    return found


def without_token(chars: set[str], vocabulary: Vocabulary) -> list[str]:
    """Those of these characters that have no token, if tokens are characters, some of several bytes; otherwise none."""
    pieces = [vocabulary.decode_bytes([i]) for i in range(vocabulary.vocab_size)]
    texts = {piece.decode(errors="ignore") for piece in pieces if not SPECIAL.fullmatch(piece)}
    are_characters = max(map(len, texts)) == 1 and not all(map(str.isascii, texts))
    return sorted(chars - texts) if are_characters else []


# ---- how texts are printed: always UTF-8, one after the other, while `steps` extend several together ----

Pairs = Iterable[tuple[str, Answer]]  # prompts and what follows them


def print_text(pairs: Pairs, steps: Iterator[Any]) -> None:
    """Print each prompt, and its text as it comes, with a line of dashes between two."""
    for i, (prompt, answer) in enumerate(pairs):
        try:
            say(f"{DIVIDER}\n{prompt}" if i else prompt)
            say(answer.text)
            while not answer.finish_reason:
                n_shown = len(answer.text)
                next(steps)
                say(answer.text[n_shown:])
        finally:
            say("\n")


def print_lines(pairs: Pairs, steps: Iterator[Any]) -> None:
    """Print a JSON object a line."""
    for found in finished(pairs, steps):
        with uninterrupted():
            say(f"{found}\n")


def print_list(pairs: Pairs, steps: Iterator[Any]) -> None:
    """Print the same objects as one JSON list."""
    before = "[\n"
    try:
        for found in finished(pairs, steps):
            with uninterrupted():  # `before` must match what was printed
                say(before + found)
                before = ",\n"
    finally:
        say("[]\n" if before == "[\n" else "\n]\n")


FORMATS = {"text": print_text, "json": print_list, "jsonl": print_lines}


def finished(pairs: Pairs, steps: Iterator[Any]) -> Iterator[str]:
    """Each text as a JSON object, as soon as it is finished."""
    for prompt, answer in pairs:
        while not answer.finish_reason:
            next(steps)
        yield as_json(prompt, answer)


def as_json(prompt: str, answer: Answer) -> str:
    """A JSON object with prompt and text and, if the user wants them, the log-probabilities of its ids, in nats.

    They are the model's own, before any option changes them, with those of the likeliest ids at each position. A token
    that is part of a character has the text U+FFFD.
    """

    def entry(i: int, logprob: float) -> dict[str, Any]:
        return {"id": i, "text": answer.tokenizer.decode_bytes([i]).decode(errors="replace"), "logprob": logprob}

    found: dict[str, Any] = {"prompt": prompt, "text": answer.text, "ids": answer.ids}
    found["finish_reason"] = answer.finish_reason
    if answer.n_logprobs is not None:
        # not strict: an id that ended the text has a log-probability, but is not among the answer's ids
        taken = zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=False)
        found["logprobs"] = [entry(i, logprob) | {"top": [entry(*pair) for pair in top]} for i, logprob, top in taken]
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def say(text: str) -> None:
    """Print without buffering, so that nothing is lost.  In a terminal, control characters become escapes."""
    if sys.stdout.isatty():
        text = CONTROLS.sub(lambda found: printable(found[0]), text)
    print(text, end="", flush=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Make Ctrl-C wait for the end of the block."""
    caught = list[int]()
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(signal.SIGINT)


def open_output() -> None:
    """Print UTF-8 in every locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
