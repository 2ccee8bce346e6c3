"""Answers in the form of OpenAI's API, whole or the part that is new, and what the model says of ids that are given."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.generate.decoder import slide
from tinygpt.model.gpt import GPT
from tinygpt.report.attention_maps import attention_maps
from tinygpt.serve.request import Completion, Given
from tinygpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scores:
    """For each id, in nats, by what is before it; None where that is nothing, or more than the context."""

    logprobs: list[float | None]
    best: list[list[tuple[int, float]] | None]  # the likeliest ids at its place


class Choice:
    """One answer of a request.  What `take` gives is the same text and tokens in one part or in many.

    A token is sent as soon as its text is: one that may belong to a stop text is held back with it.
    """

    def __init__(self, index: int, asked: Completion, scores: Scores | None) -> None:
        """`scores` are those of the prompt, where they are asked for."""
        self.answer, self.body, self.tokenizer = asked.answers[index], asked.body, asked.served.tokenizer
        self.index, self.prompt, self._scores = index, asked.prompts[index // asked.body.n], scores
        self._offsets = Offsets(self.tokenizer)
        self._n_char, self._n_sent, self._has_begun = 0, 0, False

    def take(self, piece: str, n_ids: int, finish_reason: str | None) -> dict[str, Any] | None:
        """What a piece and the ids of the answer so far add to what was sent; None when that is nothing."""
        begins = not self._has_begun
        self._n_char += len(piece)
        offsets = self._offsets.of(self.answer.ids, n_ids)
        last = bisect_left(offsets, self._n_char) if self.body.stop else n_ids
        new, self._n_sent = range(self._n_sent, last), last
        if not (piece or new or finish_reason or begins):
            return None
        self._has_begun = True
        choice: dict[str, Any] = {"index": self.index, "text": piece, "logprobs": None, "finish_reason": finish_reason}
        tokens = self._tokens(new, offsets)
        if begins and self.body.echo:
            choice["text"] = self.prompt.text + piece
            tokens = joined(prompt_tokens(self.prompt, self._scores, self.tokenizer), tokens)
        if self.body.logprobs is not None:
            choice["logprobs"] = tokens
        if self.body.return_token_ids:
            choice["token_ids"] = [self.answer.ids[i] for i in new]
            choice["prompt_token_ids"] = self.prompt.ids if begins else None
        return choice

    def _tokens(self, new: Sequence[int], offsets: list[int]) -> dict[str, list[Any]]:
        answer, has_scores = self.answer, self.body.logprobs is not None
        return {
            "tokens": [token_text(self.tokenizer, answer.ids[i]) for i in new],
            "token_logprobs": [finite(answer.logprobs[i]) for i in new] if has_scores else [],
            "top_logprobs": [
                by_text(self.tokenizer, [*answer.top_logprobs[i], (answer.ids[i], answer.logprobs[i])]) for i in new
            ]
            if has_scores
            else [],
            "text_offset": [len(self.prompt.text) + offsets[i] for i in new],
        }


class Offsets:
    """Where in a text each token begins, in characters; one in the middle of a character has that one's place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._n_char = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._found: list[int] = []

    def of(self, ids: Sequence[int], n: int) -> list[int]:
        """Those of the first n ids, which go on from the ones of the last call."""
        for i in ids[len(self._found) : n]:
            self._found.append(self._n_char)
            self._n_char += len(self._decoder.decode(self._tokenizer.decode_bytes([i])))
        return self._found


def prompt_tokens(prompt: Given, scores: Scores | None, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """The tokens of a prompt's text, as an answer's.  What has nothing before it, or too much, has no score."""
    ids = prompt.ids[prompt.n_added :]
    found: dict[str, list[Any]] = {
        "tokens": [token_text(tokenizer, i) for i in ids],
        "text_offset": Offsets(tokenizer).of(ids, len(ids)),
    }
    if scores is None:
        return found | {"token_logprobs": [], "top_logprobs": []}
    logprobs, best = scores.logprobs[prompt.n_added :], scores.best[prompt.n_added :]
    each = [
        None if logprob is None or top is None else by_text(tokenizer, [*top, (i, logprob)])
        for i, logprob, top in zip(ids, logprobs, best, strict=True)
    ]
    return found | {"token_logprobs": [None if p is None else finite(p) for p in logprobs], "top_logprobs": each}


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Both, one after the other."""
    return {name: values + second[name] for name, values in first.items()}


def by_text(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Log-probabilities by token; of two tokens with one text, the likelier."""
    found: dict[str, float] = {}
    for i, logprob in pairs:
        found.setdefault(token_text(tokenizer, i), finite(logprob))
    return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text, or as OpenAI writes what is not UTF-8: "bytes:\xe4"."""
    raw = tokenizer.decode_bytes([token_id])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's number for a token that never comes."""
    return max(logprob, -9999.0)


def usage(asked: Completion, n_written: int) -> dict[str, int]:
    """Tokens of a request."""
    n_read = sum(len(prompt.ids) for prompt in asked.prompts)
    return {"prompt_tokens": n_read, "completion_tokens": n_written, "total_tokens": n_read + n_written}


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
