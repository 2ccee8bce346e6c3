"""Speculative decoding: tokens are proposed cheaply, and one pass of the model checks several of them.

The text has exactly the distribution of the model without proposals (Leviathan et al., https://arxiv.org/abs/2211.17192,
Chen et al., https://arxiv.org/abs/2302.01318).

K proposed tokens, V vocab_size.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from tinygpt.generate.answer import Answer, keep_logprobs, past_of
from tinygpt.generate.decoder import Decoder
from tinygpt.generate.sampling import Past, apply_filters, apply_penalties, choose, draw, penalized, uniform
from tinygpt.model.gpt import GPT
from tinygpt.options import Proposals, Sampling, Search
from tinygpt.params import require


@dataclass(frozen=True, kw_only=True)
class Speculation(Proposals):
    """Where proposals come from, and how many."""

    draft: GPT | None = None  # a smaller model with the same tokenizer; None looks them up in prompt and text

    def check(self, model: GPT, search: Search) -> None:
        """Raise ParamsError when the draft does not fit the model, or a search rules out proposals."""
        n, n_draft = model.config.vocab_size, (self.draft or model).config.vocab_size
        require(
            (n == n_draft, f"draft has {n_draft} tokens, the model {n}: use a draft with the same tokenizer"),
            (search.n_row == 1, "proposals do not work with n_beam or best_of: use one or the other"),
        )


@dataclass(frozen=True)
class Proposal:
    """Ids that may come next."""

    ids: list[int]
    probabilities: Tensor | None = None  # (K, V) float64: what each was drawn from; None: they were not drawn


Propose = Callable[[Answer, int], Proposal]  # what may follow an answer, at most this many tokens


def speculate(model: GPT, answer: Answer, speculation: Speculation) -> Iterator[list[Answer]]:
    """Extend an answer to its end; yields it with each token, as `extend` does."""
    draft, most = speculation.draft, speculation.n_draft
    propose: Propose = Draft(draft, answer.prompt, most) if draft else LookUp(speculation.ngram)
    decoder, proposal = Decoder(model, [answer.prompt], room=most), Proposal([])
    logits = decoder.logits
    while True:
        answer.n_pass += 1
        chosen = verify(logits, proposal, answer)
        for i, next_id in enumerate(chosen):
            keep_logprobs(logits[i : i + 1], [answer], [next_id])
            answer.add(next_id)
            yield [answer]
            if answer.finish_reason:
                return
        decoder.back(len(proposal.ids) + 1 - len(chosen))
        n_wanted = min(most, answer.max_new_tokens - len(answer.ids) - 1, decoder.n_free() - 1)
        proposal = propose(answer, n_wanted) if n_wanted > 0 else Proposal([])
        if proposal.ids:
            logits = decoder.advance([answer.ids[-1], *proposal.ids])
        else:
            decoder.step([answer.ids[-1]])  # the context may be full: step() makes room
            logits = decoder.logits


class LookUp:
    """Propose what followed the last tokens when prompt or text had them before (https://arxiv.org/abs/2304.04487)."""

    def __init__(self, ngram: int) -> None:
        self.sizes = range(ngram, 0, -1)
        self.after: dict[tuple[int, ...], int] = {}  # tokens in a row -> the place after their last occurrence
        self.n_read = 0

    def __call__(self, answer: Answer, n: int) -> Proposal:
        """Propose n tokens, or none; a repetition shorter than n is itself repeated."""
        ids = [*answer.prompt, *answer.ids]
        for end in range(self.n_read + 1, len(ids)):
            self.after |= {tuple(ids[end - size : end]): end for size in self.sizes if size <= end}
        self.n_read = len(ids) - 1
        places = [self.after.get(tuple(ids[-size:]), 0) for size in self.sizes]
        start = next(filter(None, places), 0)  # after the longest n-gram that occurred before
        for place in range(start, start + n) if start else ():
            ids.append(ids[place])
        return Proposal(ids[self.n_read + 1 :])


class Draft:
    """A smaller model, which chooses from its own logits by the same options."""

    def __init__(self, model: GPT, prompt: Sequence[int], n_draft: int) -> None:
        self.decoder, self.room = Decoder(model, [prompt], room=n_draft), n_draft
        self.most = max(1, model.config.block_size // 2)  # that can be taken back when the context has slid
        self.n_sure = len(prompt)  # ids of prompt and text that it has read
        self.tried: list[int] = []  # ids that it read after those: its own proposals

    def __call__(self, answer: Answer, n: int) -> Proposal:
        """Propose up to n tokens, none after one that ends the text."""
        self._catch_up([*answer.prompt, *answer.ids])
        sampling, ids, drawn_from = answer.sampling, list[int](), list[Tensor]()
        while True:
            logits, past = self.decoder.logits, past_of([answer], [[*answer.ids, *ids]])
            if sampling.temperature > 0:
                drawn_from.append(distributions(logits, sampling, past)[0])
                chosen = pick(drawn_from[-1], answer.generator)
            else:
                chosen = int(apply_penalties(logits, sampling, past).argmax())  # `verify` checks it
            ids += [] if chosen is None else [chosen]
            if chosen is None or chosen in answer.end_ids or len(ids) == min(n, self.most):
                return Proposal(ids, torch.stack(drawn_from) if drawn_from else None)
            self.decoder.step([chosen])
            self.tried.append(chosen)

    def _catch_up(self, ids: list[int]) -> None:
        """Take back the proposals that were rejected, and read the ids that are new since the last call."""
        new = ids[self.n_sure :]
        n_right = n_shared(self.tried, new[:-1])
        missing = new[n_right:]
        self.decoder.back(len(self.tried) - n_right)
        if len(missing) <= min(self.room + 1, self.decoder.n_free()):
            self.decoder.advance(missing)
        else:
            for next_id in missing:
                self.decoder.step([next_id])  # the context may be full: step() makes room
        self.n_sure, self.tried = len(ids), []


def verify(logits: Tensor, proposal: Proposal, answer: Answer) -> list[int | None]:
    """The ids to take: the proposed ones up to the first that the model rejects, and one of its own.

    `logits` (K + 1, V) are the model's before each proposed id and after the last. None means that no id may follow.
    """
    n, sampling, generator = len(proposal.ids) + 1, answer.sampling, answer.generator
    past = past_of([answer] * n, [[*answer.ids, *proposal.ids[:k]] for k in range(n)])
    if proposal.probabilities is not None:
        return accept(proposal.ids, proposal.probabilities, distributions(logits, sampling, past), generator)
    before = generator.getstate()
    chosen = choose(logits, sampling, past, [generator] * n)
    n_taken = 1 + n_shared(proposal.ids, chosen)
    if n_taken < n:  # one number per token, as without proposals
        generator.setstate(before)
        for _ in range(n_taken):
            uniform(generator)
    return chosen[:n_taken]


def n_shared(one: Sequence[int], other: Sequence[int | None]) -> int:
    """How many ids at the start of both are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def accept(ids: Sequence[int], drawn_from: Tensor, wanted: Tensor, generator: random.Random) -> list[int | None]:
    """Turn ids drawn from the distributions `drawn_from` (K, V) into ids of the distributions `wanted` (K + 1, V).

    An id is taken with probability wanted / drawn_from, at most 1. In place of the first that is not taken, another is
    drawn in proportion to wanted - drawn_from where that is above 0. If all are taken, one more is drawn.
    """
    for k, i in enumerate(ids):
        if uniform(generator) * float(drawn_from[k, i]) >= float(wanted[k, i]):
            missing = (wanted[k] - drawn_from[k]).clamp(min=0)
            return [*ids[:k], pick(missing if missing.any() else wanted[k], generator)]
    return [*ids, pick(wanted[len(ids)], generator)]


def distributions(logits: Tensor, sampling: Sampling, past: Past) -> Tensor:
    """What an id is drawn from, (B, V) -> (B, V) float64; all 0 where every id is forbidden."""
    return apply_filters(penalized(logits, sampling, past), sampling).softmax(-1).nan_to_num(0)


def pick(probabilities: Tensor, generator: random.Random) -> int | None:
    """Draw an id with these probabilities, or numbers in proportion to them; None where all are 0.  (V,)"""
    number = uniform(generator)
    return int(draw(probabilities[None], [number])) if probabilities.any() else None
