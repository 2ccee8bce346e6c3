"""Text that follows a prompt: in pieces, whole, for many prompts together, or the likeliest by beam search.

B beams, V vocab_size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor

from tinygpt.generate.answer import Answer, Running, TextStream, past_of
from tinygpt.generate.decoder import Decoder
from tinygpt.generate.sampling import apply_penalties, checked
from tinygpt.generate.speculative import Speculation, speculate
from tinygpt.model.gpt import GPT
from tinygpt.options import Sampling, Search
from tinygpt.params import ParamsError, require
from tinygpt.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The keyword arguments of `generate`, `stream` and `generate_batch`."""

    max_new_tokens: Required[int]
    sampling: Sampling | Sequence[Sampling] | None  # for all prompts, or one for each; None = defaults
    search: Search | None  # None = one text
    speculation: Speculation | None
    n_logprobs: int | None  # as in Answer


def generate(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]) -> str:
    """The text that follows the prompt: `generate(model, tokenizer, "The", max_new_tokens=50)`."""
    return "".join(stream(model, tokenizer, prompt, **options))


def stream(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
    """Pieces of the text that follows the prompt, until `<|endoftext|>`; never half a character.

    A search for the best of several texts gives one piece. Raises UserError as `generate_batch` does, before the first
    piece is asked for.
    """
    (answer,), steps = begin(model, tokenizer, [prompt], **options)
    return (answer.piece for _ in steps if answer.piece)


def generate_batch(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], **options: Unpack[Options]
) -> list[Answer]:
    """What follows each prompt: the same text as if it were alone, with its own seed. Speculation runs one by one.

    Raises ParamsError when options are wrong or contradict each other, and UserError when a prompt is too long or not
    valid text.
    """
    answers, steps = begin(model, tokenizer, prompts, **options)
    for _ in steps:
        pass
    return answers


def begin(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    search: Search | None = None,
    speculation: Speculation | None = None,
    n_logprobs: int | None = None,
) -> tuple[list[Answer], Iterator[list[Answer]]]:
    """An answer for each prompt, and the steps that extend them.  Raises as `generate_batch` does."""
    search, sampling = search or Search(), sampling or Sampling()
    if search.n_beam > 1 and n_logprobs is not None:
        raise ParamsError([f"beam search (n_beam={search.n_beam}) cannot return log-probabilities: leave them out"])
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    require((len(each) == len(prompts), f"{len(each)} samplings were given for {len(prompts)} prompts"))
    for one in each:
        search.check(one)
    if speculation is not None:
        speculation.check(model, search)
    size = model.config.block_size
    answers = [
        Answer(prompt, tokenizer, one, max_new_tokens=max_new_tokens, block_size=size, n_logprobs=n_logprobs)
        for prompt, one in zip(prompts, each, strict=True)
    ]
    return answers, extend(model, answers, search=search, speculation=speculation)


def extend(
    model: GPT,
    answers: Sequence[Answer],
    *,
    at_once: int | None = None,
    search: Search | None = None,
    speculation: Speculation | None = None,
) -> Iterator[list[Answer]]:
    """Extend each answer to its end, `at_once` rows together (None: all); with speculation, one after the other.

    Yields the answers that just got a token or, from a search, their whole text.
    """
    if speculation is not None:
        for answer in answers:
            yield from speculate(model, answer, speculation)
        return
    if search is not None and search.n_row > 1:
        n = (at_once or search.n_row * len(answers)) // search.n_row or 1
        for i in range(0, len(answers), n):
            find_best(model, answers[i : i + n], search)
            yield list(answers[i : i + n])
        return
    running, waiting = Running(model), deque(answers)
    while waiting or running.answers:
        n = min(len(waiting), (at_once or len(answers)) - len(running.answers))
        running.add([waiting.popleft() for _ in range(n)])
        yield running.step()


def find_best(model: GPT, answers: Sequence[Answer], search: Search) -> None:
    """Write the best of several texts into each answer; the texts of `best_of` are drawn together."""
    if search.n_beam > 1:
        for answer in answers:
            beam_search(model, answer, search)
        return
    drawn = [[answer.another(i) for i in range(search.best_of)] for answer in answers]
    for _ in extend(model, list(chain.from_iterable(drawn))):
        pass
    for answer, several in zip(answers, drawn, strict=True):
        best = max(several, key=Answer.mean_logprob)
        answer.logprobs, answer.top_logprobs = best.logprobs, best.top_logprobs
        answer.write(best.ids)


# ---- beam search: the likeliest text found by following n_beam texts side by side ----


@dataclass(frozen=True)
class Beam:
    """A text as its new ids, with the one that ends it."""

    ids: list[int]
    score: float  # log-probability in nats; for an ended text, divided by (number of ids) ** length_penalty
    parent: int = 0  # the running beam that it continues


def beam_search(model: GPT, answer: Answer, search: Search) -> None:
    """Write the best ended beam into an answer.  The rules, step by step, are those of transformers.

    Each step keeps the n_beam likeliest continuations that do not end. Those among the first n_beam candidates that do
    end compete, by score, for n_beam places. The search is over when all places are taken and either early_stopping is
    true, or the likeliest running beam, scored as if it ended now, beats no place. With "never" and a positive
    length_penalty it is scored as if it had max_new_tokens, which is better.
    """
    decoder, n = Decoder(model, [answer.prompt]), search.n_beam
    running, places = [Beam([], 0.0)], list[Beam]()
    while running:
        candidates = continue_beams(decoder.logits, running, answer, n * (1 + len(answer.end_ids)))
        ended = [has_ended(beam, answer) for beam in candidates]
        places += [
            Beam(beam.ids, beam.score / len(beam.ids) ** search.length_penalty)
            for beam, end in zip(candidates[:n], ended, strict=False)
            if end
        ]
        places = sorted(places, key=lambda beam: -beam.score)[:n]
        running = [beam for beam, end in zip(candidates, ended, strict=True) if not end][:n]
        if not running or (len(places) == n and not can_improve(running[0], places[-1], answer, search)):
            break
        decoder.keep([beam.parent for beam in running])
        decoder.step([beam.ids[-1] for beam in running])
    answer.write(places[0].ids if places else [])


def continue_beams(logits: Tensor, beams: list[Beam], answer: Answer, n: int) -> list[Beam]:
    """The n likeliest of all continuations by one id, the likeliest first.  (B, V) float32"""
    past = past_of([answer] * len(beams), [beam.ids for beam in beams])
    logprobs = checked(apply_penalties(logits.log_softmax(-1), answer.sampling, past))
    scores = (logprobs + torch.tensor([beam.score for beam in beams], device=logits.device)[:, None]).flatten()
    best = scores.topk(min(n, scores.numel()))
    found = [(*divmod(at, logits.size(1)), score) for score, at in zip(*map(Tensor.tolist, best), strict=True)]
    return [Beam([*beams[i].ids, next_id], score, i) for i, next_id, score in found if score > -torch.inf]


def has_ended(beam: Beam, answer: Answer) -> bool:
    """Whether the last id ends the text, a stop text is in it, or it has all the ids it may have."""
    if beam.ids[-1] in answer.end_ids or len(beam.ids) == answer.max_new_tokens:
        return True
    text = TextStream(answer.tokenizer, answer.sampling.stop)
    if answer.sampling.stop:
        for i in beam.ids:
            text.push(i)
    return text.stopped


def can_improve(running: Beam, worst: Beam, answer: Answer, search: Search) -> bool:
    """Whether the likeliest running beam may still beat the worst place."""
    as_long = search.early_stopping == "never" and search.length_penalty > 0
    length = answer.max_new_tokens if as_long else len(running.ids)
    return search.early_stopping != "true" and running.score / length**search.length_penalty > worst.score
