"""What the model writes for each prompt, and how much it was surprised by each token, its own and those of real text.

N tokens, V vocab_size.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import printable
from tinygpt.files import atomic_write, fenced
from tinygpt.generate import Sampling
from tinygpt.generate.answer import prompt_ids
from tinygpt.generate.stream import generate_batch
from tinygpt.model.gpt import GPT
from tinygpt.report.config import EvaluateParams
from tinygpt.report.perplexity import token_logprobs
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds

MOST_READ = 64  # tokens of a prompt, its last, whose surprise is told
MOST_LOOKED_AT = 10_000_000  # tokens of a split among which documents are chosen
N_LIKELIEST = 5  # tokens named that the model found likeliest in the same place

Alternative = tuple[str, float]  # a token and its share of the probability


@dataclass(frozen=True)
class Scored:
    """A token of a text, as the model that has read what is before it sees it."""

    text: str  # empty where it ends within a character, which the last one of it shows
    nats: float  # minus the logarithm of its probability
    likeliest: list[Alternative]


@dataclass(frozen=True)
class Sample:
    """A prompt, what the model went on with, and where the prompt is from a real text what that went on with."""

    prompt: str
    text: str
    read: list[Scored]
    written: list[Scored]
    followed: list[Scored] | None


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write them as Markdown."""
    with atomic_write(path) as file:
        file.write("# Samples\n")
        for sample in samples:
            heading = (
                re.sub(r"([\\`*_<\[])", r"\\\1", printable(sample.prompt)) or "(none)"
            )  # of one line, and only text
            file.write(f"\n## Prompt: {heading}\n\n{fenced(f'{sample.prompt}{sample.text}')}")


def make_samples(model: GPT, tokenizer: Tokenizer, tokens: TokenIds, params: EvaluateParams) -> list[Sample]:
    """One for each of the params' prompts, and for some from the held-out tokens."""
    found = [*held_out(tokens, tokenizer, params, model.config.block_size)]
    prompts = [*params.prompts, *(prompt for prompt, _ in found)]
    followed = [*[None] * len(params.prompts), *(rest for _, rest in found)]
    answers = generate_batch(
        model,
        tokenizer,
        prompts,
        max_new_tokens=params.max_new_tokens,
        sampling=sampling_of(params),
        n_logprobs=N_LIKELIEST,
    )
    samples = []
    for prompt, rest, answer in zip(prompts, followed, answers, strict=True):
        pieces = zip(
            answer.ids, answer.logprobs, answer.top_logprobs, strict=False
        )  # the id that ended it has some too
        read = prompt_ids(tokenizer, prompt)
        real = None if rest is None else score(model, tokenizer, read, tokenizer.encode(rest))
        start = max(1, len(read) - min(MOST_READ, model.config.block_size - 1))
        samples.append(
            Sample(
                prompt=prompt,
                text=answer.text,
                read=score(model, tokenizer, read[:start], read[start:]),
                written=[*_named(tokenizer, pieces)],
                followed=real,
            )
        )
    return samples


def held_out(
    tokens: TokenIds, tokenizer: Tokenizer, params: EvaluateParams, block_size: int
) -> Iterator[tuple[str, str]]:
    """The beginnings of documents, evenly chosen and cut before a space, and what follows each in its document.

    A BPE token of most words begins with the space before it: a prompt that ends in a space has an odd next token.
    """
    n_read = max(2, min(24, block_size // 4))
    starts, lengths = document_spans(tokens[:MOST_LOOKED_AT], tokenizer)
    starts = starts[lengths > 2 * n_read]
    for i in range(min(params.held_out_prompts, len(starts))):
        start = starts[len(starts) * (2 * i + 1) // (2 * params.held_out_prompts)]
        ids = tokens[start : start + min(n_read + params.max_new_tokens, block_size)].tolist()
        ids = ids[: next((n for n, id in enumerate(ids) if id in tokenizer.border_ids), len(ids))]
        text = tokenizer.decode(ids).rstrip("\ufffd")
        prompt = tokenizer.decode(ids[:n_read]).rstrip("\ufffd")
        words = prompt.rsplit(None, 1)[0] if prompt.split() else prompt
        prompt = words if words.strip() else prompt
        yield prompt, text[len(prompt) :]


def document_spans(tokens: TokenIds, tokenizer: Tokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each document of some tokens begins, and how many it has; none of the special ones between documents."""
    borders = np.flatnonzero(np.isin(tokens, tokenizer.border_ids))
    starts = np.concatenate(([0], borders + 1))
    lengths = np.append(borders, len(tokens)) - starts
    return starts[lengths > 0], lengths[lengths > 0]


def score(model: GPT, tokenizer: Tokenizer, read: Sequence[int], ids: Sequence[int]) -> list[Scored]:
    """What the model says of each of the ids after those read, by one pass: those that fit into its context."""
    ids = list(ids)[: model.config.block_size]
    before = list(read)[-max(1, model.config.block_size + 1 - len(ids)) :]
    if not ids:
        return []
    logprobs = token_logprobs(model, np.array([*before, *ids[:-1]], np.int64))[len(before) - 1 :]  # (N, V)
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :N_LIKELIEST]
    tops = [[(int(id), float(row[id])) for id in at] for at, row in zip(best, logprobs, strict=True)]
    return [*_named(tokenizer, zip(ids, logprobs[np.arange(len(ids)), ids].tolist(), tops, strict=True))]


def _named(tokenizer: Tokenizer, pieces: object) -> Iterator[Scored]:
    """(id, log-probability, the likeliest ids with theirs) of each token -> the same as texts, rounded."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id, logprob, likeliest in pieces:  # type: ignore[attr-defined]
        named = [(tokenizer.decode([other]), round(float(np.exp(p)), 4)) for other, p in likeliest]
        yield Scored(decoder.decode(tokenizer.decode_bytes([id])), round(max(0.0, -logprob), 3), named)


def sampling_of(params: EvaluateParams) -> Sampling:
    """The options of `Sampling` that the params have; all others keep their default."""
    shared = {field.name for field in fields(Sampling)} & {field.name for field in fields(params)}
    return Sampling(**{name: getattr(params, name) for name in shared})
