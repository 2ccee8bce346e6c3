"""Answers in the form of OpenAI's API: whole, or the part that is new."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from tinygpt.serve.request import Completion, Prompt
from tinygpt.serve.scores import Scores
from tinygpt.tokenizer import Tokenizer


class Choice:
    """One answer of a request.  What `take` gives is the same text and tokens in one part or in many.

    A token is told as soon as its text is: one that may belong to a stop text is held back with it.
    """

    def __init__(self, index: int, asked: Completion, scores: Scores | None) -> None:
        """`scores` are those of the prompt, where they are asked for."""
        self.answer, self.body, self.tokenizer = asked.answers[index], asked.body, asked.served.tokenizer
        self.index, self.prompt, self._scores = index, asked.prompts[index // asked.body.n], scores
        self._offsets = Offsets(self.tokenizer)
        self._n_char, self._n_told, self._has_begun = 0, 0, False

    def take(self, piece: str, n_ids: int, finish_reason: str | None) -> dict[str, Any] | None:
        """What a piece and the ids of the answer so far add to what was told; None when that is nothing."""
        begins = not self._has_begun
        self._n_char += len(piece)
        offsets = self._offsets.of(self.answer.ids, n_ids)
        last = bisect_left(offsets, self._n_char) if self.body.stop else n_ids
        told, self._n_told = range(self._n_told, last), last
        if not (piece or told or finish_reason or begins):
            return None
        self._has_begun = True
        choice: dict[str, Any] = {"index": self.index, "text": piece, "logprobs": None, "finish_reason": finish_reason}
        tokens = self._tokens(told, offsets)
        if begins and self.body.echo:
            choice["text"] = self.prompt.text + piece
            tokens = joined(prompt_tokens(self.prompt, self._scores, self.tokenizer), tokens)
        if self.body.logprobs is not None:
            choice["logprobs"] = tokens
        if self.body.return_token_ids:
            choice["token_ids"] = [self.answer.ids[i] for i in told]
            choice["prompt_token_ids"] = self.prompt.ids if begins else None
        return choice

    def _tokens(self, told: Sequence[int], offsets: list[int]) -> dict[str, list[Any]]:
        answer, has_scores = self.answer, self.body.logprobs is not None
        return {
            "tokens": [token_text(self.tokenizer, answer.ids[i]) for i in told],
            "token_logprobs": [finite(answer.logprobs[i]) for i in told] if has_scores else [],
            "top_logprobs": [
                by_text(self.tokenizer, [*answer.top_logprobs[i], (answer.ids[i], answer.logprobs[i])]) for i in told
            ]
            if has_scores
            else [],
            "text_offset": [len(self.prompt.text) + offsets[i] for i in told],
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


def prompt_tokens(prompt: Prompt, scores: Scores | None, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """The tokens of a prompt's text, as an answer's.  What has nothing before it, or too much, has no score."""
    ids = prompt.ids[prompt.n_added :]
    found: dict[str, list[Any]] = {
        "tokens": [token_text(tokenizer, i) for i in ids],
        "text_offset": Offsets(tokenizer).of(ids, len(ids)),
    }
    if scores is None:
        return found | {"token_logprobs": [], "top_logprobs": []}
    logprobs, best = scores.logprobs[prompt.n_added :], scores.best[prompt.n_added :]
    told = [
        None if logprob is None or top is None else by_text(tokenizer, [*top, (i, logprob)])
        for i, logprob, top in zip(ids, logprobs, best, strict=True)
    ]
    return found | {"token_logprobs": [None if p is None else finite(p) for p in logprobs], "top_logprobs": told}


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Both, one behind the other."""
    return {name: values + second[name] for name, values in first.items()}


def by_text(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Log-probabilities by token; of two tokens with one text, the likelier."""
    found: dict[str, float] = {}
    for i, logprob in pairs:
        found.setdefault(token_text(tokenizer, i), finite(logprob))
    return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text, or as OpenAI writes what is no UTF-8: "bytes:\xe4"."""
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
