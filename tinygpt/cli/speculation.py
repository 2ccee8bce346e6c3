"""The options of speculative decoding: where proposals come from, and what they brought."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tinygpt.cli.engine import Engine, is_gguf, model_path
from tinygpt.cli.sampling import flag, named_as_options
from tinygpt.generate import Answer, Speculation
from tinygpt.params import require

SIZES = ("n_draft", "ngram")


def add_speculation_options(command: argparse.ArgumentParser) -> None:
    """None has a default here, so that contradictions are those of the user."""
    default = Speculation()
    command.add_argument(
        "--draft", type=Path, metavar="FOLDER", help="a smaller model with the same tokenizer, which proposes tokens"
    )
    command.add_argument(
        "--prompt-lookup", action="store_true", help="propose what followed the last tokens where they stood before"
    )
    command.add_argument(
        "--n-draft", type=int, help=f"tokens that are proposed for each pass (default: {default.n_draft})"
    )
    command.add_argument(
        "--ngram", type=int, help=f"of --prompt-lookup: so many last tokens, or fewer (default: {default.ngram})"
    )


def check_speculation(args: argparse.Namespace) -> None:
    """Raises ParamsError with all options that do not go together."""
    proposes = args.draft is not None or args.prompt_lookup
    name = "--draft" if args.draft is not None else "--prompt-lookup"
    searched = [f"{flag(n)}={v}" for n in ("n_beam", "best_of") if (v := getattr(args, n)) not in (None, 1)]
    require(
        (args.draft is None or not args.prompt_lookup, "--draft and --prompt-lookup both propose: give one of them"),
        (proposes or args.n_draft is None, f"--n-draft={args.n_draft} needs --draft or --prompt-lookup"),
        (args.ngram is None or args.prompt_lookup, f"--ngram={args.ngram} needs --prompt-lookup"),
        *((not proposes, f"{option} follows several texts, {name} proposes one: leave one out") for option in searched),
        (not proposes or not is_gguf(model_path(args)), f"{name} cannot be had with llama.cpp: name a folder of ours"),
    )
    sizes_of(args)


def sizes_of(args: argparse.Namespace) -> Speculation:
    """What the numbers say, without a draft.  Raises ParamsError where they are out of their intervals."""
    given = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    with named_as_options(SIZES):
        return Speculation(**given)


def with_proposals(engine: Engine, args: argparse.Namespace) -> Engine:
    """The engine, which speculates where that is asked for.

    Raises UserError with what is wrong with the draft's files, or that its tokens are others.
    """
    if args.draft is None and not args.prompt_lookup:
        return engine
    from tinygpt.cli.torch_engine import TorchEngine, compile_aloud, load_folder

    assert isinstance(engine, TorchEngine)
    speculation, stepping = sizes_of(args), engine.model
    if args.draft is not None:
        draft, tokenizer = load_folder(args.draft, args.tokenizer)
        require(
            (
                getattr(engine.vocabulary, "tokens", None) == tokenizer.tokens,
                f"--draft={args.draft} has other tokens than the model: take one trained with the same tokenizer",
            )
        )
        stepping = draft.to(next(engine.model.parameters()).device)
        speculation = dataclasses.replace(speculation, draft=stepping)
    if args.compile:
        compile_aloud(stepping, room=speculation.n_draft)
    engine.speculation = speculation
    return engine


def report(answers: Sequence[Answer], seconds: float) -> str:
    """One line on what the proposals brought."""
    n_token, n_pass = sum(len(answer.ids) for answer in answers), sum(answer.n_pass for answer in answers)
    return f"{n_token / max(1, n_pass):.2f} tokens a pass of the model, {n_token / seconds:,.0f} tokens a second"
