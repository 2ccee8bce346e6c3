"""Answers: what follows a prompt, and the loop that extends many of them together.  B rows, V vocab_size."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from tinygpt.generate.decoder import Decoder
from tinygpt.generate.options import Sampling
from tinygpt.generate.sampling import Past, choose
from tinygpt.generate.text import TextStream
from tinygpt.model import GPT
from tinygpt.params import require
from tinygpt.tokenizer import Tokenizer


class Answer:
    """One prompt and what follows it so far."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        block_size: int,
    ) -> None:
        """Raises ParamsError when an option does not fit another, the prompt or the vocabulary."""
        room = block_size - len(prompt) if sampling.when_full == "stop" else max_new_tokens
        require(
            (max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be within [1, inf)"),
            (
                sampling.min_new_tokens <= max_new_tokens,
                f"min_new_tokens={sampling.min_new_tokens} is more than max_new_tokens={max_new_tokens}",
            ),
            (
                max_new_tokens < 1 or room >= 1,
                f"prompt has {len(prompt)} tokens, which leaves no room in a context of {block_size}: "
                "shorten it, or set when_full=slide",
            ),
        )
        sampling.check_ids(tokenizer.vocab_size)
        self.prompt = list(prompt)
        self.sampling = dataclasses.replace(sampling, seed=0)  # answers that share it are treated together
        self.ids: list[int] = []  # what follows, without the id that ended it
        self.logprobs: list[float] = []  # of all ids and the one that ended it, where they were asked for
        self.text = ""
        self.piece = ""  # what the last token added to the text
        self.finish_reason: Literal["stop", "length"] | None = None  # None = not yet at its end
        self.eos_id, self.end_ids = tokenizer.eos_id, {tokenizer.eos_id, *sampling.stop_ids}
        self.max_new_tokens = min(max_new_tokens, room)
        self.generator = random.Random(sampling.seed)  # its own: other rows draw nothing from it
        self._text = TextStream(tokenizer, sampling.stop)

    def add(self, next_id: int | None) -> None:
        """Append an id; None where there is none that may follow."""
        ended = next_id is None or next_id in self.end_ids
        if next_id is None or ended:
            self.piece = ""
        else:
            self.ids.append(next_id)
            self.piece = self._text.push(next_id)
        if ended or self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            self.piece += self._text.finish()
        self.text += self.piece

    def mean_logprob(self) -> float:
        """Mean log-probability of a token, in nats; -inf without one."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


def extend(model: GPT, answers: Sequence[Answer], *, with_logprobs: bool = False) -> Iterator[list[Answer]]:
    """Extend each answer to its end, all together a token at a time; yields those that just got one.

    A prompt that several answers share is read once.
    """
    prompts = list(dict.fromkeys(tuple(answer.prompt) for answer in answers))
    decoder, rows = Decoder(model, prompts), list(answers)
    if len(prompts) < len(rows):
        decoder.keep([prompts.index(tuple(answer.prompt)) for answer in rows])
    while rows:
        logits = decoder.logits
        logprobs = logits.double().log_softmax(-1) if with_logprobs else None
        for i, next_id in enumerate(choose_rows(logits, rows)):
            rows[i].add(next_id)
            if logprobs is not None and next_id is not None:
                rows[i].logprobs.append(float(logprobs[i, next_id]))
        yield rows
        going_on = [i for i, answer in enumerate(rows) if not answer.finish_reason]
        if len(going_on) < len(rows):
            rows = [rows[i] for i in going_on]
            if rows:
                decoder.keep(going_on)
        if rows:
            decoder.step([answer.ids[-1] for answer in rows])


def choose_rows(logits: Tensor, answers: Sequence[Answer]) -> list[int | None]:
    """The next id of each row; those that differ in nothing but the seed are treated together."""
    groups: dict[Sampling, list[int]] = {}
    for i, answer in enumerate(answers):
        groups.setdefault(answer.sampling, []).append(i)
    chosen: list[int | None] = [None] * len(answers)
    for sampling, at in groups.items():
        rows = [answers[i] for i in at]
        ids = choose(logits[at], sampling, past_of(rows), [row.generator for row in rows])
        for i, next_id in zip(at, ids, strict=True):
            chosen[i] = next_id
    return chosen


def past_of(answers: Sequence[Answer]) -> Past:
    """What the answers have so far; they share their sampling."""
    written = [answer.ids for answer in answers]
    return Past([answer.prompt for answer in answers], written, answers[0].eos_id, answers[0].sampling.stop_ids)
