"""Answers and models in the form of OpenAI's API, and what the page shows about a token."""

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.generate.decoder import slide
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_maps
from tinygpt.model.products import fast_products
from tinygpt.serve.request import Completion, Given, Refusal, Served, are_ids, check_ids, find_model, read_object
from tinygpt.tokenizer import Tokenizer

SCORED = 512  # positions whose logits are held at a time


class Scores(NamedTuple):
    """Log-probabilities, in nats, of the last n ids of a text: not of its first id, nor of ids beyond the context."""

    logprobs: Tensor  # (n,)
    best: Tensor  # (n, k) int32, the likeliest ids at each position
    best_logprobs: Tensor  # (n, k)


class Choice:
    """One answer of a request.  Whether `take` is called once or often, the parts add up to the same text and tokens.

    A token is sent with its text: while text that may belong to a stop text is held back, so are its tokens.
    """

    def __init__(self, index: int, asked: Completion, scores: Scores | None) -> None:
        """`scores` are those of the prompt, if the request asks for them."""
        self.answer, self.body, self.tokenizer = asked.answers[index], asked.body, asked.served.tokenizer
        self.index, self.prompt, self._scores = index, asked.prompts[index // asked.body.n], scores
        self._offsets = list[int]()  # of the answer's tokens so far
        self._more_offsets = offsets(self.tokenizer, self.answer.ids)  # of those that have come since
        self._n_char, self._n_sent, self.has_begun = 0, 0, False

    def take(self, piece: str, n_ids: int, finish_reason: str | None) -> dict[str, Any] | None:
        """What to send for a new piece, when the answer has n_ids ids so far; None if there is nothing new."""
        begins, self.has_begun = not self.has_begun, True
        self._n_char += len(piece)
        new = range(0)
        if self.body.logprobs is not None or self.body.return_token_ids:
            self._offsets += islice(self._more_offsets, n_ids - len(self._offsets))
            last = bisect_left(self._offsets, self._n_char) if self.body.stop else n_ids
            new, self._n_sent = range(self._n_sent, last), last
        if not (piece or new or finish_reason or begins):
            return None
        choice = {"index": self.index, **self._part(piece, new, begins), "finish_reason": finish_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = [self.answer.ids[i] for i in new]
            choice["prompt_token_ids"] = self.prompt.ids if begins else None
        return choice

    def whole(self) -> dict[str, Any] | None:
        """The finished answer; it is empty where only the prompt is sent."""
        answer = self.answer
        return self.take(answer.text, len(answer.ids), answer.finish_reason or "length")

    def _part(self, piece: str, new: Sequence[int], begins: bool) -> dict[str, Any]:
        """The text and its tokens."""
        echoes = begins and self.body.echo
        part: dict[str, Any] = {"text": self.prompt.text + piece if echoes else piece, "logprobs": None}
        if self.body.logprobs is not None:
            answer, start = self.answer, len(self.prompt.text)
            rows = [(answer.ids[i], answer.logprobs[i], answer.top_logprobs[i], start + self._offsets[i]) for i in new]
            before = prompt_rows(self.prompt, self._scores, self.tokenizer) if echoes and self._scores else []
            part["logprobs"] = completion_logprobs(self.tokenizer, [*before, *rows])
        return part


class ChatChoice(Choice):
    """An answer in a chat: a message, or in a stream what is added to one."""

    def _part(self, piece: str, new: Sequence[int], begins: bool) -> dict[str, Any]:
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


def offsets(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[int]:
    """Where each token begins in a text, in characters; one that continues a character has that character's place."""
    n_char, decoder = 0, codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        raw = tokenizer.decode_bytes([i])
        is_cut = bool(raw and decoder.getstate()[0]) and not 0x80 <= raw[0] < 0xC0  # a begun character ends as U+FFFD
        yield n_char + is_cut
        n_char += len(decoder.decode(raw))


# A token's id, its log-probability, the likeliest at its position and where its text begins; a first one has no score.
Row = tuple[int, float | None, list[tuple[int, float]] | None, int]


def prompt_rows(prompt: Given, scores: Scores, tokenizer: Tokenizer) -> list[Row]:
    """The tokens of a prompt's text.  One with nothing before it, or too far back for the context, has no score."""
    ids = prompt.ids[prompt.n_added :]
    logprobs, best, best_logprobs = (each.tolist() for each in scores)
    pairs = [list(zip(*each, strict=True)) for each in zip(best, best_logprobs, strict=True)]
    unknown = [None] * (len(ids) - len(logprobs))
    return list(zip(ids, [*unknown, *logprobs], [*unknown, *pairs], offsets(tokenizer, ids), strict=True))


def completion_logprobs(tokenizer: Tokenizer, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Tokens in the form of a completion; where two likely tokens have the same text, the likelier one counts."""
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
    r"""A token as text; bytes that are not UTF-8 as OpenAI writes them: "bytes:\xe4"."""
    raw = tokenizer.decode_bytes([token_id])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """A number for JSON, which has no infinity: -9999 is OpenAI's value for a token that is never chosen."""
    return max(logprob, -9999.0)


def usage(asked: Completion) -> dict[str, int]:
    """How many tokens a request has read and written."""
    n_read, n_written = (sum(len(each.ids) for each in several) for several in (asked.prompts, asked.answers))
    return {"prompt_tokens": n_read, "completion_tokens": n_written, "total_tokens": n_read + n_written}


@torch.inference_mode()
def score(model: GPT, ids: Sequence[int], n_best: int) -> Scores:
    """Score ids in one forward pass over the last block_size of them."""
    seen = torch.tensor(ids[-model.config.block_size :], device=model.tok_emb.weight.device)
    with fast_products(seen.device):
        hidden = model.hidden(seen[None])[0, :-1]  # (T, C)
    found = []
    for part, targets in zip(hidden.split(SCORED), seen[1:].split(SCORED), strict=True):
        logprobs = model.lm_head(part).float().log_softmax(-1)  # (t, V)
        best = logprobs.topk(min(n_best, logprobs.size(1)))
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        found.append((chosen.cpu(), best.indices.int().cpu(), best.values.cpu()))
    return Scores(*map(torch.cat, zip(*found, strict=True)))


def describe(served: Served, created: int) -> dict[str, Any]:
    """A model as in OpenAI's list, with what the page needs to know about it."""
    sizes = {name: getattr(served.model.config, name) for name in ("n_layer", "n_head", "block_size")}
    head = {"id": served.name, "object": "model", "created": created, "owned_by": "tinygpt"}
    return head | {"n_weight": served.n_weight} | sizes


# ---- what the page shows about a token: its alternatives, and what each head attended to ----


@torch.inference_mode()
def explain(raw: bytes, models: Mapping[str, Served]) -> dict[str, Any]:
    """The likeliest tokens after `prompt` and `text`, with the one `taken`, and what each head attended to there.

    `raw` is the body of a request; all three are ids in it. Raises Refusal.
    """
    document: Any = read_object(raw)
    name, prompt, text, taken = (document.get(key) for key in ("model", "prompt", "text", "taken"))
    are_lists = isinstance(prompt, list) and isinstance(text, list)
    if not (are_lists and prompt and are_ids([*prompt, *text, taken])):
        raise Refusal(400, "prompt and text must be lists of ids, and taken an id")
    served = find_model(name if isinstance(name, str) else None, models)
    for field, ids in (("prompt", prompt), ("text", text), ("taken", [taken])):
        check_ids(field, ids, served)
    model, tokenizer = served.model, served.tokenizer
    seen = seen_before(prompt, text, model.config.block_size)
    last = model.hidden(torch.tensor([seen], device=model.tok_emb.weight.device))[0, -1]
    shares = model.lm_head(last).float().softmax(-1)
    best = shares.topk(min(20, len(shares))).indices.tolist()
    weights = attention_maps(model, seen, rows=slice(-1, None))[:, :, 0]  # (n_layer, n_head, T)
    return {
        "alternatives": [
            {"id": i, "token": token_text(tokenizer, i), "p": float(shares[i])} for i in dict.fromkeys([*best, taken])
        ],
        "tokens": [token_text(tokenizer, i) for i in seen],
        "attention": weights.astype(float).round(4).tolist(),
    }


def seen_before(prompt: Sequence[int], written: Sequence[int], block_size: int) -> list[int]:
    """The ids in the decoder's context for the token after both: whenever it is full, its older half is dropped."""
    seen = list(prompt[-block_size:])
    for i in written:
        seen.append(i)
        slide(seen, block_size)
    return seen
