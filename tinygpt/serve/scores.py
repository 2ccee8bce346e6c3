"""What a model makes of ids that are given: their probabilities, and what it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.generate.decoder import slide
from tinygpt.model.gpt import GPT
from tinygpt.report.attention_maps import attention_maps


@dataclass(frozen=True)
class Scores:
    """For each id, in nats, by what stands before it; None where that is nothing, or more than the context."""

    logprobs: list[float | None]
    best: list[list[tuple[int, float]] | None]  # the likeliest ids at its place


@torch.inference_mode()
def score(model: GPT, ids: Sequence[int], n_best: int) -> Scores:
    """Score ids by one reading of the last block_size of them."""
    seen = list(ids[-model.config.block_size :])
    logprobs = model(torch.tensor([seen], device=model.tok_emb.weight.device))[0, :-1].float().log_softmax(-1)  # (T, V)
    chosen = logprobs.gather(1, torch.tensor(seen[1:], device=logprobs.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(n_best, logprobs.size(1)))
    pairs = [list(zip(*each, strict=True)) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    unknown = [None] * (len(ids) - len(chosen))
    return Scores([*unknown, *chosen], [*unknown, *pairs])


@torch.inference_mode()
def look(
    model: GPT, ids: Sequence[int], n_best: int, taken: int | None
) -> tuple[list[tuple[int, float]], NDArray[np.float32]]:
    """Of the token that follows some ids: the likeliest and the one that was taken, with probabilities, and the weights
    of each layer and head over the ids when it was computed.  -> pairs, (n_layer, n_head, T)
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
