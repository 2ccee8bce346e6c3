"""Beam search: the likeliest text, as far as so many texts next to each other show.  B beams, V vocab_size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt.generate.answer import Answer, TextStream, past_of
from tinygpt.generate.decoder import Decoder
from tinygpt.generate.sampling import apply_penalties
from tinygpt.model.gpt import GPT
from tinygpt.options import Search
from tinygpt.tokenizer import Tokenizer


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
