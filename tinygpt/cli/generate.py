"""`python -m tinygpt generate`: print prompts and what follows them, as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from tinygpt.cli.engine import Engine, add_engine_options, check_engine, open_engine
from tinygpt.cli.output import FORMATS, Output, add_output_options, check_output, open_output, warn
from tinygpt.cli.prompts import MOST_SHOWN, Prompt, add_prompt_options, check_prompts, raise_some, read_prompts
from tinygpt.cli.remarks import remarks
from tinygpt.cli.sampling import Settings, add_sampling_options, named_as_options, read_settings, together
from tinygpt.cli.speculation import add_speculation_options, check_speculation, report, with_proposals
from tinygpt.errors import UserError
from tinygpt.generate import Answer, Search
from tinygpt.generate.options import seed_after
from tinygpt.params import require

MOST_TEXTS = 1000  # of a prompt


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_prompt_options(command)
    command.add_argument("--n", type=int, default=1, help="texts of each prompt, each with a seed one higher")
    add_output_options(command)
    command.add_argument("--batch-size", type=int, default=32, help="texts computed together (default: %(default)s)")
    add_sampling_options(command)
    add_speculation_options(command)
    add_engine_options(command)


def run(args: argparse.Namespace) -> None:
    """Continue the prompts."""
    checks = (read_settings, check_prompts, check_number, check_output, check_engine, check_speculation)
    settings: Settings = together(*(partial(check, args) for check in checks))[0]
    prompts = read_prompts(args)
    open_output()
    n_row = rows_together(settings.search, args.n * len(prompts), args.batch_size)
    engine = with_proposals(open_engine(args, n_row=n_row), args)
    with named_as_options():
        answers = begin(engine, prompts, settings, n=args.n, n_logprobs=args.logprobs)
    for remark in remarks(prompts, [len(answer.prompt) for answer in answers[:: args.n]], engine)[:MOST_SHOWN]:
        warn(remark)
    began = time.monotonic()
    output = FORMATS[args.format](engine.vocabulary, with_logprobs=args.logprobs is not None)
    try:
        if settings.search == Search():
            steps = engine.extend(answers, at_once=args.batch_size)
            write_in_order([prompt.text for prompt in prompts for _ in range(args.n)], answers, steps, output)
        else:
            for prompt in prompts:
                output.begin(prompt.text)
                output.end(prompt.text, engine.search(prompt.text, settings, n_logprobs=args.logprobs))
    finally:
        output.close()
    if args.draft is not None or args.prompt_lookup:
        print(report(answers, time.monotonic() - began), file=sys.stderr)


def check_number(args: argparse.Namespace) -> None:
    """Raises ParamsError where the number of texts contradicts how they are chosen."""
    searched = args.n_beam not in (None, 1) or args.best_of not in (None, 1)
    require(
        (1 <= args.n <= MOST_TEXTS, f"--n={args.n} must be within [1, {MOST_TEXTS}]"),
        (args.batch_size >= 1, f"--batch-size={args.batch_size} must be within [1, inf)"),
        (args.n <= 1 or not searched, f"--n={args.n} takes all texts, --n-beam and --best-of the best one: give one"),
        (
            args.n <= 1 or args.temperature is None or args.temperature != 0,
            f"--n={args.n} needs --temperature above 0: at 0 all texts are the same",
        ),
    )


def rows_together(search: Search, n_text: int, batch_size: int) -> int:
    """How many texts are computed at a time, of so many in all: each prompt is searched by itself."""
    return min(batch_size, n_text) if search == Search() else search.n_row


def begin(
    engine: Engine, prompts: Sequence[Prompt], settings: Settings, *, n: int, n_logprobs: int | None
) -> list[Answer]:
    """n answers of each prompt.  Raises ParamsError with what does not fit the model, and in which prompts."""
    settings.sampling.check_ids(engine.vocabulary.vocab_size)
    answers: list[Answer] = []
    problems: list[str] = []
    for prompt in prompts:
        seeds = [seed_after(settings.sampling.seed, i) for i in range(n)]
        try:
            answers += [engine.begin(prompt.text, settings, seed=seed, n_logprobs=n_logprobs) for seed in seeds]
        except UserError as error:
            problems.append(prompt.named(str(error)))
    raise_some(problems)
    return answers


def write_in_order(
    prompts: Sequence[str], answers: Sequence[Answer], steps: Iterator[list[Answer]], output: Output
) -> None:
    """Print each answer as it comes, while those behind it get tokens, too."""
    for prompt, answer in zip(prompts, answers, strict=True):
        output.begin(prompt)
        while not answer.finish_reason:
            next(steps)
            output.show(answer)
        output.end(prompt, answer)
