"""Text that follows a prompt: piece by piece, whole, of many prompts together, or the likeliest by beam search.

B beams, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor

from tinygpt.generate.answer import Answer, Running, TextStream, past_of
from tinygpt.generate.decoder import Decoder
from tinygpt.generate.sampling import apply_penalties
from tinygpt.generate.speculative import Speculation, speculate
from tinygpt.model.gpt import GPT
from tinygpt.options import Sampling, Search, seed_after
from tinygpt.params import ParamsError
from tinygpt.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`."""

    max_new_tokens: Required[int]
    sampling: Sampling | None  # None = as the model has it: Sampling()
    search: Search | None  # None = one text
    speculation: Speculation | None


def generate(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]) -> str:
    """The text that follows the prompt: `generate(model, tokenizer, "The", max_new_tokens=50)`."""
    return "".join(stream(model, tokenizer, prompt, **options))


def stream(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
    """Pieces of the text that follows the prompt, until `<|endoftext|>`; never half a character.

    A search for the best of several texts is done at once and gives one piece. Raises UserError, before the first
    piece is asked for, as `generate_batch` does.
    """
    search, speculation = options.get("search") or Search(), options.get("speculation")
    if search != Search():
        answers = generate_batch(model, tokenizer, [prompt], **options)
        return iter([answer.text for answer in answers if answer.text])
    if speculation is not None:
        speculation.check(model, search)
    n, block_size = options["max_new_tokens"], model.config.block_size
    answer = Answer(prompt, tokenizer, options.get("sampling") or Sampling(), max_new_tokens=n, block_size=block_size)
    return (answer.piece for _ in extend(model, [answer], speculation=speculation) if answer.piece)


def generate_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    search: Search | None = None,
    speculation: Speculation | None = None,
    n_logprobs: int | None = None,
) -> list[Answer]:
    """What follows each prompt; the same as one by one, each with its own seed. With speculation it is one by one.

    `sampling` is one for all or one for each prompt; `n_logprobs` is that of Answer. Raises ParamsError when options
    are wrong or contradict each other, and UserError when a prompt is not a text.
    """
    search = search or Search()
    if search.n_beam > 1 and n_logprobs is not None:
        raise ParamsError([f"n_beam={search.n_beam} keeps no log-probabilities of its tokens: leave them out"])
    each = [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
    for one in each:
        search.check(one)
    if speculation is not None:
        speculation.check(model, search)
    kept = 0 if n_logprobs is None and search.best_of > 1 else n_logprobs
    answers = [
        Answer(
            prompt,
            tokenizer,
            dataclasses.replace(one, seed=seed_after(one.seed, i)),
            max_new_tokens=max_new_tokens,
            block_size=model.config.block_size,
            n_logprobs=kept,
        )
        for prompt, one in zip(prompts, each, strict=True)
        for i in range(search.best_of)
    ]
    if search.n_beam > 1:
        for answer in answers:
            beam_search(model, tokenizer, answer, search)
        return answers
    for _ in extend(model, answers, speculation=speculation):
        pass
    groups = [answers[i : i + search.best_of] for i in range(0, len(answers), search.best_of)]
    return [max(group, key=Answer.mean_logprob) if len(group) > 1 else group[0] for group in groups]


def extend(
    model: GPT, answers: Sequence[Answer], *, at_once: int | None = None, speculation: Speculation | None = None
) -> Iterator[list[Answer]]:
    """Extend each answer to its end, this many together (None: all), with proposals one after the other.

    Yields those that just got a token.
    """
    if speculation is not None:
        for answer in answers:
            yield from speculate(model, answer, speculation)
        return
    running, waiting = Running(model), deque(answers)
    while waiting or running.answers:
        n = min(len(waiting), (at_once or len(answers)) - len(running.answers))
        running.add([waiting.popleft() for _ in range(n)])
        yield running.step()


# ---- beam search: the likeliest text, as far as n_beam texts side by side show ----


@dataclass(frozen=True)
class Beam:
    """A text by its new ids, with the one that ends it."""

    ids: list[int]
    score: float  # log-probability in nats; of an ended text divided by (number of ids) ** length_penalty
    parent: int = 0  # the running beam that it continues


def beam_search(model: GPT, tokenizer: Tokenizer, answer: Answer, search: Search) -> None:
    """Write the best ended beam into an answer.  The rules, step by step, are those of transformers.

    Each step keeps the n_beam likeliest continuations that do not end. Those among the first n_beam candidates that end
    compete, by score, for n_beam places. The search is over when all places are taken and either early_stopping is
    true, or the likeliest running beam, scored as if it ended now, beats no place; with "never" it is scored as if it
    had max_new_tokens, where a positive length_penalty makes that better.
    """
    decoder, n = Decoder(model, [answer.prompt]), search.n_beam
    running, places = [Beam([], 0.0)], list[Beam]()
    while running:
        candidates = continue_beams(decoder.logits, running, answer, n * (1 + len(answer.end_ids)))
        ended = [has_ended(beam, answer, tokenizer) for beam in candidates]
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
    for next_id in places[0].ids if places else [None]:
        answer.add(next_id)


def continue_beams(logits: Tensor, beams: list[Beam], answer: Answer, n: int) -> list[Beam]:
    """The n likeliest of all continuations by one id, the likeliest first.  (B, V) float32"""
    past = past_of([answer] * len(beams), [beam.ids for beam in beams])
    logprobs = apply_penalties(logits.log_softmax(-1), answer.sampling, past)
    scores = (logprobs + torch.tensor([beam.score for beam in beams], device=logits.device)[:, None]).flatten()
    best = scores.topk(min(n, scores.numel()))
    found = [(*divmod(at, logits.size(1)), score) for score, at in zip(*map(Tensor.tolist, best), strict=True)]
    return [Beam([*beams[i].ids, next_id], score, i) for i, next_id, score in found if score > -torch.inf]


def has_ended(beam: Beam, answer: Answer, tokenizer: Tokenizer) -> bool:
    """Whether the last id ends the text, a stop text is in it, or it has all the ids it may have."""
    if beam.ids[-1] in answer.end_ids or len(beam.ids) == answer.max_new_tokens:
        return True
    text = TextStream(tokenizer, answer.sampling.stop)
    if answer.sampling.stop:
        for i in beam.ids:
            text.push(i)
    return text.stopped


def can_improve(running: Beam, worst: Beam, answer: Answer, search: Search) -> bool:
    """Whether the likeliest running beam may still beat the worst of all places."""
    as_long = search.early_stopping == "never" and search.length_penalty > 0
    length = answer.max_new_tokens if as_long else len(running.ids)
    return search.early_stopping != "true" and running.score / length**search.length_penalty > worst.score
