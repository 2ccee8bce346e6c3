"""What the page of a run shows and only a model, a tokenizer and token files know: reports/look.json, of bounded size.

T tokens.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.files import atomic_write
from tinygpt.model.attention_maps import attention_maps
from tinygpt.model.config import config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.parts import parts_of
from tinygpt.report.samples import MOST_LOOKED_AT, Sample, document_spans
from tinygpt.report.tokenizer import paragraph, vocabulary
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds, TokensMeta

MOST_SAMPLES = 8
MOST_TOKENS = 300  # of each
MOST_WEIGHTS = 200_000  # of attention, over all layers and heads
MOST_ATTENDING = 48  # tokens of the text whose attention is shown
N_DOCUMENTS = 3  # longest and shortest ones
BEGINNING = 12  # tokens of a document that name it


def look(
    model: GPT, tokenizer: Tokenizer, meta: TokensMeta, splits: Mapping[str, TokenIds], samples: Sequence[Sample]
) -> dict[str, Any]:
    """All of it, as JSON; of the splits those that have tokens, training first."""
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
        "samples": [_shortened(dataclasses.asdict(sample)) for sample in samples[:MOST_SAMPLES]],
        "attention": attention(model, tokenizer, samples),
    }


def write_look(path: Path, found: dict[str, Any]) -> None:
    """Write it, a line for each of its parts."""
    with atomic_write(path) as file:
        lines = (f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False)}" for name, part in found.items())
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


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
    """Where each head looks in the first sample: bytes of 0 to 255 in base64, (n_layer, n_head, T, T).

    None where no sample has a text.
    """
    config = model.config
    room = math.isqrt(MOST_WEIGHTS // (config.n_layer * config.n_head))
    text = next((sample.prompt + sample.text for sample in samples if sample.prompt), "")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][: max(2, min(config.block_size, MOST_ATTENDING, room))]
    if len(ids) < 2:
        return None
    maps = (attention_maps(model, ids) * 255).round().astype(np.uint8)
    return {
        "tokens": [tokenizer.decode([id]) for id in ids],
        "shape": list(maps.shape),
        "maps": base64.b64encode(maps.tobytes()).decode(),
    }


def _shortened(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:MOST_TOKENS] if isinstance(value, list) else value for key, value in sample.items()}
