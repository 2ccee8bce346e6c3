"""Answers and models in the form of OpenAI's API, and what the page shows of a token."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.generate.decoder import slide
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_maps
from tinygpt.serve.request import Completion, Given, Refusal, Served, check_ids, find_model, read_object
from tinygpt.tokenizer import Tokenizer

N_ALTERNATIVES = 20  # that the page shows for a token


@dataclass(frozen=True)
class Scores:
    """The last n ids of some, scored in nats by what is before them; others have nothing there, or too much."""

    logprobs: NDArray[np.float32]  # (n,)
    best: NDArray[np.int32]  # (n, k), the likeliest ids at its place
    best_logprobs: NDArray[np.float32]  # (n, k)


class Choice:
    """One answer of a request.  What `take` gives is the same text and tokens in one part or in many.

    A token is sent as soon as its text is: one that may belong to a stop text is held back with it.
    """

    def __init__(self, index: int, asked: Completion, scores: Scores | None) -> None:
        """`scores` are those of the prompt, where they are asked for."""
        self.answer, self.body, self.tokenizer = asked.answers[index], asked.body, asked.served.tokenizer
        self.index, self.prompt, self._scores = index, asked.prompts[index // asked.body.n], scores
        self._offsets = Offsets(self.tokenizer)
        self._n_char, self._n_sent, self.has_begun = 0, 0, False

    def take(self, piece: str, n_ids: int, finish_reason: str | None) -> dict[str, Any] | None:
        """What a piece and the ids of the answer so far add to what was sent; None when that is nothing."""
        begins, self.has_begun = not self.has_begun, True
        self._n_char += len(piece)
        new, offsets = range(0), list[int]()
        if self.body.logprobs is not None or self.body.return_token_ids:
            offsets = self._offsets.of(self.answer.ids, n_ids)
            last = bisect_left(offsets, self._n_char) if self.body.stop else n_ids
            new, self._n_sent = range(self._n_sent, last), last
        if not (piece or new or finish_reason or begins):
            return None
        choice = {"index": self.index, **self._part(piece, new, offsets, begins), "finish_reason": finish_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = [self.answer.ids[i] for i in new]
            choice["prompt_token_ids"] = self.prompt.ids if begins else None
        return choice

    def whole(self) -> dict[str, Any] | None:
        """The answer at its end, or none of it where only the prompt is sent."""
        answer = self.answer
        return self.take(answer.text, len(answer.ids), answer.finish_reason or "length")

    def _part(self, piece: str, new: Sequence[int], offsets: list[int], begins: bool) -> dict[str, Any]:
        """The text and its tokens."""
        echoes = begins and self.body.echo
        part: dict[str, Any] = {"text": self.prompt.text + piece if echoes else piece, "logprobs": None}
        if self.body.logprobs is not None:
            answer, n_before = self.answer, len(self.prompt.text)
            rows = [(answer.ids[i], answer.logprobs[i], answer.top_logprobs[i], n_before + offsets[i]) for i in new]
            before = prompt_rows(self.prompt, self._scores, self.tokenizer) if echoes and self._scores else []
            part["logprobs"] = completion_logprobs(self.tokenizer, [*before, *rows])
        return part


class ChatChoice(Choice):
    """The same as a message, or as what is added to one."""

    def _part(self, piece: str, new: Sequence[int], offsets: list[int], begins: bool) -> dict[str, Any]:
        content = {"content": piece} if piece or begins else {}
        role = {"role": "assistant", "refusal": None} if begins else {}
        part: dict[str, Any] = {"delta" if self.body.stream else "message": role | content, "logprobs": None}
        if self.body.logprobs is not None:
            part["logprobs"] = {"content": [self._token(i) for i in new], "refusal": None}
        return part

    def _token(self, i: int) -> dict[str, Any]:
        best = [self._scored(*pair) for pair in self.answer.top_logprobs[i]]
        return self._scored(self.answer.ids[i], self.answer.logprobs[i]) | {"top_logprobs": best}

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.decode_bytes([token_id])
        return {"token": token_text(self.tokenizer, token_id), "logprob": finite(logprob), "bytes": list(raw)}


class Offsets:
    """Where in a text each token begins, in characters; one in the middle of a character has that one's place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._n_char = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._found: list[int] = []

    def of(self, ids: Sequence[int], n: int) -> list[int]:
        """Those of the first n ids, which continue those of the last call."""
        for i in ids[len(self._found) : n]:
            self._found.append(self._n_char)
            self._n_char += len(self._decoder.decode(self._tokenizer.decode_bytes([i])))
        return self._found


# A token's id, its log-probability, the likeliest in its place and where its text begins; a first one has no score.
Row = tuple[int, float | None, list[tuple[int, float]] | None, int]


def prompt_rows(prompt: Given, scores: Scores, tokenizer: Tokenizer) -> list[Row]:
    """The tokens of a prompt's text.  What has nothing before it, or too much, has no score."""
    ids = prompt.ids[prompt.n_added :]
    offsets, n_unknown = Offsets(tokenizer).of(ids, len(ids)), max(0, len(ids) - len(scores.logprobs))
    rows: list[Row] = [(ids[i], None, None, offsets[i]) for i in range(n_unknown)]
    for i in range(n_unknown, len(ids)):
        at = i - len(ids)  # scores are those of the last
        best = zip(scores.best[at].tolist(), scores.best_logprobs[at].tolist(), strict=True)
        rows.append((ids[i], float(scores.logprobs[at]), list(best), offsets[i]))
    return rows


def completion_logprobs(tokenizer: Tokenizer, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Tokens as a completion has them; of two likely ones with one text, the likelier."""
    part: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for i, logprob, best, offset in rows:
        found: dict[str, float] = {}
        for each, p in [*(best or []), (i, logprob or 0.0)]:
            found.setdefault(token_text(tokenizer, each), finite(p))
        scored = (finite(logprob), found) if logprob is not None else (None, None)
        for values, value in zip(part.values(), (token_text(tokenizer, i), *scored, offset), strict=True):
            values.append(value)
    return part


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text, or as OpenAI writes what is not UTF-8: "bytes:\xe4"."""
    raw = tokenizer.decode_bytes([token_id])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's number for a token that is never chosen."""
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
    chosen = logprobs.gather(1, torch.tensor(seen[1:], device=logprobs.device)[:, None])[:, 0]
    best = logprobs.topk(min(n_best, logprobs.size(1)))
    return Scores(chosen.cpu().numpy(), best.indices.int().cpu().numpy(), best.values.cpu().numpy())


def describe(served: Served, created: int) -> dict[str, Any]:
    """A model as OpenAI's list has it, and what a page needs to know of it."""
    sizes = {name: getattr(served.model.config, name) for name in ("n_layer", "n_head", "block_size")}
    head = {"id": served.name, "object": "model", "created": created, "owned_by": "tinygpt"}
    return head | {"n_weight": served.n_weight} | sizes


# ---- what the page shows of a token: what might have been there, and what each head attended to ----


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
    best = candidates(served.model, seen, N_ALTERNATIVES, taken)
    weights = attention_maps(served.model, seen, rows=slice(-1, None))[:, :, 0]  # (n_layer, n_head, T)
    return {
        "alternatives": [{"id": i, "token": token_text(served.tokenizer, i), "p": p} for i, p in best],
        "tokens": [token_text(served.tokenizer, i) for i in seen],
        "attention": weights.astype(float).round(4).tolist(),
    }


@torch.inference_mode()
def candidates(model: GPT, ids: Sequence[int], n_best: int, taken: int | None) -> list[tuple[int, float]]:
    """The likeliest tokens after some ids, and the one that was taken, with their probabilities."""
    shares = model(torch.tensor([ids], device=model.tok_emb.weight.device))[0, -1].float().softmax(-1)
    best = shares.topk(min(n_best, len(shares)))
    pairs = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    if taken is not None:
        pairs.setdefault(taken, float(shares[taken]))
    return list(pairs.items())


def seen_before(prompt: Sequence[int], written: Sequence[int], block_size: int) -> list[int]:
    """What of prompt and text the decoder has before it when it chooses the next token: a full context has forgotten
    its older half.
    """
    seen = list(prompt[-block_size:])
    for i in written:
        seen.append(i)
        slide(seen, block_size)
    return seen
