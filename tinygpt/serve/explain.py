"""What the page shows of a token: what might have been there, and what each head attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.generate.decoder import slide
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_maps
from tinygpt.serve.choices import token_text
from tinygpt.serve.limits import Refusal
from tinygpt.serve.request import Served, check_ids, find_model, read_object

N_ALTERNATIVES = 20  # that are shown for a token


def explain(raw: bytes, models: Mapping[str, Served]) -> dict[str, Any]:
    """What might have followed `prompt` and `text`, both ids, and the id that was `taken`; what each head attended to.

    `raw` is the body of a request. Raises Refusal.
    """
    document = read_object(raw)
    name = document.get("model")
    served = find_model(name if isinstance(name, str) else None, models)
    prompt, text, taken = document.get("prompt"), document.get("text", []), document.get("taken")
    for key, ids in {"prompt": prompt, "text": text, "taken": [] if taken is None else [taken]}.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or (key == "prompt" and not ids):
            raise Refusal(400, f"{key} must be {'an id' if key == 'taken' else 'a list of ids'}", param=key)
        check_ids(key, ids, served)
    assert isinstance(prompt, list)
    seen = seen_before(prompt, text, served.model.config.block_size)
    best, weights = candidates(served.model, seen, N_ALTERNATIVES, taken)
    return {
        "alternatives": [{"id": i, "token": token_text(served.tokenizer, i), "p": p} for i, p in best],
        "tokens": [token_text(served.tokenizer, i) for i in seen],
        "attention": weights.astype(float).round(4).tolist(),
    }


@torch.inference_mode()
def candidates(
    model: GPT, ids: Sequence[int], n_best: int, taken: int | None
) -> tuple[list[tuple[int, float]], NDArray[np.float32]]:
    """The likeliest tokens after some ids, and the one that was taken, with their probabilities; and the attention of
    each layer and head to the ids when they were computed.  -> pairs, (n_layer, n_head, T)
    """
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _model, _ids, logits: outputs.append(logits))
    try:
        weights = attention_maps(model, list(ids), rows=slice(-1, None))[:, :, 0]
    finally:
        hook.remove()
    shares = outputs[0][0, -1].float().softmax(-1)
    best = shares.topk(min(n_best, len(shares)))
    pairs = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    if taken is not None:
        pairs.setdefault(taken, float(shares[taken]))
    return list(pairs.items()), weights


def seen_before(prompt: Sequence[int], written: Sequence[int], block_size: int) -> list[int]:
    """What of prompt and text the decoder has before it when it chooses the next token: a full context has forgotten
    its older half.
    """
    seen = list(prompt[-block_size:])
    for i in written:
        seen.append(i)
        slide(seen, block_size)
    return seen
