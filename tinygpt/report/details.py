"""What the model writes, what surprises it and what it attends to: reports/samples.md, and details.json.

N tokens, T tokens of a sequence, V vocab_size.
"""

import base64
import codecs
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import printable
from tinygpt.files import fenced, write_text
from tinygpt.generate import Sampling
from tinygpt.generate.answer import prompt_ids
from tinygpt.generate.stream import generate_batch
from tinygpt.model.config import config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_maps, parts_of
from tinygpt.report.config import EvaluateParams
from tinygpt.report.perplexity import token_logprobs
from tinygpt.report.tokenizer import paragraph, vocabulary
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds, TokensMeta

MOST_READ = 64  # last tokens of a prompt whose surprise is shown
MOST_LOOKED_AT = 10_000_000  # first tokens of a split, from which documents are chosen
N_LIKELIEST = 5  # likeliest tokens shown for each position
MOST_SAMPLES = 8
MOST_TOKENS = 300  # of each
MOST_WEIGHTS = 200_000  # attention weights, over all layers and heads
MOST_ATTENDING = 48  # tokens of the text whose attention is shown
N_DOCUMENTS = 3  # of the longest, and of the shortest
BEGINNING = 12  # first tokens of a document, which stand for it


@dataclass(frozen=True)
class Scored:
    """A token of a text, and how the model predicts it from the tokens before."""

    text: str  # empty if it ends inside a character, which that character's last token shows
    nats: float  # minus the logarithm of its probability
    likeliest: list[tuple[str, float]]  # (token, probability)


@dataclass(frozen=True)
class Sample:
    """A prompt, how the model continued it, and how it continues in the text that it is from, if any."""

    prompt: str
    text: str
    read: list[Scored]
    written: list[Scored]
    followed: list[Scored] | None


def prompt_to_try(samples: Sequence[Sample]) -> str:
    """A line for examples of use: the beginning of a held-out text, else of a prompt of evaluate.prompts."""
    by_preference = sorted(samples, key=lambda sample: sample.followed is None)
    lines = (re.search(r"\w.{0,60}(?!\S)", sample.prompt) for sample in by_preference)
    return next((printable(line[0]) for line in lines if line), "The")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write them as Markdown."""
    text = "# Samples\n"
    for sample in samples:
        heading = re.sub(r"([\\`*_<\[])", r"\\\1", printable(sample.prompt)) or "(none)"  # one line of plain text
        text += f"\n## Prompt: {heading}\n\n{fenced(f'{sample.prompt}{sample.text}')}"
    write_text(path, text)


def make_samples(model: GPT, tokenizer: Tokenizer, tokens: TokenIds, params: EvaluateParams) -> list[Sample]:
    """A sample for each of the params' prompts, and for some from the held-out tokens."""
    asked: list[tuple[str, str | None]] = [(prompt, None) for prompt in params.prompts]
    asked += held_out(tokens, tokenizer, params, model.config.block_size)
    answers = generate_batch(
        model,
        tokenizer,
        [prompt for prompt, _ in asked],
        max_new_tokens=params.max_new_tokens,
        sampling=Sampling(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=params.seed),
        n_logprobs=N_LIKELIEST,
    )
    samples = []
    for (prompt, rest), answer in zip(asked, answers, strict=True):
        # the id that ended the answer has probabilities too
        pieces = zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=False)
        read = prompt_ids(tokenizer, prompt)
        real = None if rest is None else score(model, tokenizer, read, tokenizer.encode(rest))
        start = max(1, len(read) - min(MOST_READ, model.config.block_size - 1))
        before = score(model, tokenizer, read[:start], read[start:])
        samples.append(Sample(prompt, answer.text, before, [*_named(tokenizer, pieces)], real))
    return samples


def held_out(
    tokens: TokenIds, tokenizer: Tokenizer, params: EvaluateParams, block_size: int
) -> Iterator[tuple[str, str]]:
    """The beginnings of evenly spaced documents, cut before a space, and what follows each in its document.

    The BPE token of most words begins with the space before it, so a prompt that ends in a space has an odd next token.
    """
    n_read = max(2, min(24, block_size // 4))
    starts, lengths = document_spans(tokens[:MOST_LOOKED_AT], tokenizer)
    starts = starts[lengths > 2 * n_read]
    n_prompt = min(params.held_out_prompts, len(starts))
    for i in range(n_prompt):
        start = starts[len(starts) * (2 * i + 1) // (2 * n_prompt)]
        ids = tokens[start : start + min(n_read + params.max_new_tokens, block_size)].tolist()
        ids = ids[: next((n for n, id in enumerate(ids) if id in tokenizer.border_ids), len(ids))]
        text = tokenizer.decode(ids).rstrip("\ufffd")
        prompt = tokenizer.decode(ids[:n_read]).rstrip("\ufffd")
        prompt = re.sub(r"(?<=\S)\s+\S+\Z", "", prompt.rstrip() or prompt)
        yield prompt, text[len(prompt) :]


def document_spans(tokens: TokenIds, tokenizer: Tokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each document begins, and how many tokens it has, without the special ones between documents."""
    borders = np.flatnonzero(np.isin(tokens, tokenizer.border_ids))
    starts = np.concatenate(([0], borders + 1))
    lengths = np.append(borders, len(tokens)) - starts
    return starts[lengths > 0], lengths[lengths > 0]


def score(model: GPT, tokenizer: Tokenizer, read: Sequence[int], ids: Sequence[int]) -> list[Scored]:
    """How the model predicts each of the `ids` after `read`, in one pass; ids beyond its context are left out."""
    ids = list(ids)[: model.config.block_size]
    before = list(read)[-max(1, model.config.block_size + 1 - len(ids)) :]
    if not ids:
        return []
    logprobs = token_logprobs(model, np.array([*before, *ids[:-1]], np.int64))[len(before) - 1 :]  # (N, V)
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :N_LIKELIEST]
    tops = [[(int(id), float(row[id])) for id in at] for at, row in zip(best, logprobs, strict=True)]
    return [*_named(tokenizer, zip(ids, logprobs[np.arange(len(ids)), ids].tolist(), tops, strict=True))]


def _named(tokenizer: Tokenizer, pieces: Iterable[tuple[int, float, Any]]) -> Iterator[Scored]:
    """(id, log-probability, the likeliest ids with theirs) of each token -> the same with texts, rounded."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id, logprob, likeliest in pieces:
        named = [(tokenizer.decode([other]), round(float(np.exp(p)), 4)) for other, p in likeliest]
        yield Scored(decoder.decode(tokenizer.decode_bytes([id])), round(max(0.0, -logprob), 3), named)


def details(
    model: GPT, tokenizer: Tokenizer, meta: TokensMeta, splits: Mapping[str, TokenIds], samples: Sequence[Sample]
) -> dict[str, Any]:
    """The contents of details.json; `splits` has those with tokens, training first."""
    held_out = [*splits.values()][-1]
    return {
        "model": {
            "config": config_fields(model.config),
            "n_weights": model.n_params(),
            "parts": {name: dataclasses.asdict(part) for name, part in parts_of(model).items()},
        },
        "documents": {name: documents(tokens, tokenizer) for name, tokens in splits.items()},
        "tokenizer": vocabulary(tokenizer, splits["train"])
        | {
            "bytes_per_token": {name: meta.split(name).bytes / meta.split(name).tokens for name in splits},
            "paragraph": paragraph(tokenizer, held_out),
        },
        "samples": [
            {key: value[:MOST_TOKENS] if isinstance(value, list) else value for key, value in sample.items()}
            for sample in map(dataclasses.asdict, samples[:MOST_SAMPLES])
        ],
        "attention": attention(model, tokenizer, samples),
    }


def write_details(path: Path, found: dict[str, Any]) -> None:
    """Write details.json, a line for each of its parts."""
    lines = (f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False)}" for name, part in found.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def documents(tokens: TokenIds, tokenizer: Tokenizer) -> dict[str, Any]:
    """How long documents are, in tokens, and how the longest and the shortest of a split begin."""
    starts, lengths = document_spans(tokens[:MOST_LOOKED_AT], tokenizer)
    order = np.argsort(lengths, kind="stable")

    def named(rows: NDArray[np.intp]) -> list[dict[str, Any]]:
        pairs = [(int(starts[row]), int(lengths[row])) for row in rows]
        return [{"tokens": n, "text": tokenizer.decode(tokens[at : at + min(n, BEGINNING)])} for at, n in pairs]

    return {
        "median": int(np.median(lengths)),
        "longest": named(order[::-1][:N_DOCUMENTS]),
        "shortest": named(order[:N_DOCUMENTS]),
    }


def attention(model: GPT, tokenizer: Tokenizer, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What each head attends to in the first sample with a prompt: bytes, 0 to 255, in base64, (n_layer, n_head, T, T).

    None if no sample has a prompt, or the context is one token.
    """
    config = model.config
    room = math.isqrt(MOST_WEIGHTS // (config.n_layer * config.n_head))
    text = next((sample.prompt + sample.text for sample in samples if sample.prompt), "")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][: min(config.block_size, MOST_ATTENDING, max(2, room))]
    if len(ids) < 2:
        return None
    maps = (attention_maps(model, ids) * 255).round().astype(np.uint8)
    return {
        "tokens": [tokenizer.decode([id]) for id in ids],
        "shape": list(maps.shape),
        "maps": base64.b64encode(maps.tobytes()).decode(),
    }
