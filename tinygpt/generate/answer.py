"""Answers: what follows a prompt, as ids and as text, and the loop that extends many of them together.

Text comes in pieces: never half a character, never the beginning of a stop text.  B rows, V vocab_size.
"""

import codecs
import copy
import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, Self

from torch import Tensor

from tinygpt.generate.decoder import Decoder
from tinygpt.generate.sampling import Past, as_double, choose
from tinygpt.model.gpt import GPT
from tinygpt.options import Sampling, checked, seed_after
from tinygpt.params import require


class Vocabulary(Protocol):
    """What generation needs from a tokenizer, ours or another program's: ids up to vocab_size, two of them borders."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...


def prompt_ids(tokenizer: Vocabulary, prompt: str) -> list[int]:
    """The ids of a text as the beginning of a document, after `bos_id`.  Raises UserError as `checked` does."""
    return [tokenizer.bos_id, *tokenizer.encode(checked(prompt))]


class TextStream:
    """Turn ids into pieces of text; joined, these are the text before the first stop text.

    A possible beginning of a stop text is held back until more is known: with stop "end", the tokens "a e", "n", "ough"
    give the pieces "a ", "", "enough", and "a e", "nd it" give the one piece "a ".
    """

    def __init__(self, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # a stop text was found; nothing comes after it
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, next_id: int) -> str:
        """Add an id -> the piece of text that is now certain."""
        return self._take(self._decoder.decode(self.tokenizer.decode_bytes([next_id])))

    def finish(self) -> str:
        """Return what was held back, once no more ids come; half a character becomes U+FFFD."""
        piece = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return piece

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        end = find_stop(text, self.stop)
        self.stopped = end is not None
        if end is None:
            end = len(text) - n_held(text, self.stop)
        self._held = "" if self.stopped else text[end:]
        return text[:end]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """The start of the stop text that is complete first, or None.

    "abcd" with stop "abcd" and "bc" gives 1: reading character by character, "bc" is there first.
    """
    found = [(start + len(each), start) for each in stop if (start := text.find(each)) >= 0]
    return min(found)[1] if found else None


def n_held(text: str, stop: Sequence[str]) -> int:
    """Length of the text's longest suffix that a stop text may begin with: 2 for "a en" with stop "end"."""
    longest = min(len(text), max((len(each) - 1 for each in stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(each.startswith(text[-n:]) for each in stop)), 0)


class Answer:
    """One prompt and what follows it so far."""

    def __init__(
        self,
        prompt: str | Sequence[int],
        tokenizer: Vocabulary,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        block_size: int,
        n_logprobs: int | None = None,
    ) -> None:
        """`prompt` is a text, which begins a document, or ids, which are used unchanged.

        `n_logprobs` None keeps no log-probabilities, 0 those of the chosen ids, n also those of the n likeliest.
        Raises UserError with what is wrong with the prompt, or does not fit the model.
        """
        self.prompt = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        n, least, most = len(self.prompt), sampling.min_new_tokens, max_new_tokens
        room = block_size - n if sampling.when_full == "stop" else most
        full = f"prompt of {n} tokens leaves no room in a context of {block_size}: shorten it, or set when_full=slide"
        require(
            (n >= 1, "prompt is empty: give at least one id, such as the tokenizer's bos_id"),
            (most >= 1, f"max_new_tokens={most} must be 1 or more"),
            (least <= most, f"min_new_tokens={least} is more than max_new_tokens={most}"),
            (room >= min(1, most), full),
        )
        sampling.check_ids(tokenizer.vocab_size)
        self.tokenizer, self.seed = tokenizer, sampling.seed
        self.sampling = dataclasses.replace(sampling, seed=0)  # answers that share it are computed together
        self.ids: list[int] = []  # what follows the prompt, without the id that ended it
        self.n_logprobs = n_logprobs
        self.logprobs: list[float] = []  # of all ids and the one that ended it, before any option applies, in nats
        self.top_logprobs: list[list[tuple[int, float]]] = []  # of the likeliest ids in the place of each of these
        self.text = ""
        self.piece = ""  # what the last token added to the text
        self.finish_reason: Literal["stop", "length"] | None = None  # None = not finished
        self.eos_id, self.end_ids = tokenizer.eos_id, {tokenizer.eos_id, *sampling.stop_ids}
        self.n_pass = 0  # passes of the model; only speculative decoding counts them
        self.max_new_tokens = min(most, room)
        self.generator = random.Random(sampling.seed)  # its own: other rows do not draw from it
        self._text = TextStream(tokenizer, sampling.stop)

    def add(self, next_id: int | None) -> None:
        """Append an id; one that ends a text, or None where every id is forbidden, ends the answer instead."""
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

    def write(self, ids: Sequence[int]) -> None:
        """Append ids as one piece, up to one that ends the answer, and end it after the last in any case."""
        for next_id in [*ids, None]:
            if not self.finish_reason:
                self.add(next_id)
        self.piece = self.text

    def another(self, n: int) -> Self:
        """The same answer before its first id, with the n-th seed after its own; it keeps log-probabilities."""
        other = copy.copy(self)
        other.ids, other.logprobs, other.top_logprobs, other.n_logprobs = [], [], [], self.n_logprobs or 0
        other.generator = random.Random(seed_after(self.seed, n))
        other._text = TextStream(self.tokenizer, self.sampling.stop)
        return other

    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, in nats; -inf without any."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


class Running:
    """Answers that are extended together, a token at a time; between two steps, answers may join and leave.

    An answer's text does not depend on what runs next to it.
    """

    def __init__(self, model: GPT) -> None:
        self.answers: list[Answer] = []  # those that have not ended
        self._decoder = Decoder(model, [])
        self._is_behind = False  # whether the decoder has yet to read the last id of each answer

    def add(self, answers: Sequence[Answer]) -> None:
        """Start answers that have no token yet.  A prompt that several of them share is read once."""
        if answers:
            self._catch_up()
            n, places = len(self.answers), dict[tuple[int, ...], int]()
            rows = [places.setdefault(tuple(answer.prompt), n + len(places)) for answer in answers]
            self._decoder.join(list(places))
            self._decoder.keep([*range(n), *rows])
            self.answers += answers

    def step(self) -> list[Answer]:
        """Give each answer its next token -> the answers that got one; those that end now stop running."""
        self._catch_up()
        rows, logits = self.answers, self._decoder.logits
        chosen = choose_rows(logits, rows)
        keep_logprobs(logits, rows, chosen)
        for answer, next_id in zip(rows, chosen, strict=True):
            answer.add(next_id)
        self._is_behind = True
        self._keep([i for i, answer in enumerate(rows) if not answer.finish_reason])
        return rows

    def drop(self, answers: Sequence[Answer]) -> None:
        """Drop these answers if they still run."""
        self._keep([i for i, answer in enumerate(self.answers) if answer not in answers])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self.answers):
            self._decoder.keep(rows)
            self.answers = [self.answers[i] for i in rows]

    def _catch_up(self) -> None:
        if self._is_behind and self.answers:
            self._decoder.step([answer.ids[-1] for answer in self.answers])
        self._is_behind = False


def keep_logprobs(logits: Tensor, answers: Sequence[Answer], chosen: Sequence[int | None]) -> None:
    """Record the model's log-probabilities in the answers that ask for them.  (B, V)"""
    for i, (answer, next_id) in enumerate(zip(answers, chosen, strict=True)):
        if answer.n_logprobs is not None and next_id is not None:
            logprobs = as_double(logits[i]).log_softmax(-1)
            best = logprobs.topk(min(answer.n_logprobs, len(logprobs)))
            answer.logprobs.append(float(logprobs[next_id]))
            answer.top_logprobs.append([*zip(best.indices.tolist(), best.values.tolist(), strict=True)])


def choose_rows(logits: Tensor, answers: Sequence[Answer]) -> list[int | None]:
    """The next id of each row; rows that differ only in their seed are computed together."""
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


def past_of(answers: Sequence[Answer], written: Sequence[Sequence[int]] | None = None) -> Past:
    """The past of answers that share their sampling, with the texts `written` instead of their own where given."""
    first = answers[0]
    texts = [answer.ids for answer in answers] if written is None else written
    return Past([answer.prompt for answer in answers], texts, first.eos_id, first.sampling.stop_ids)
