"""From the logits of the next token to its id: a list of functions of logits, then a draw.

B rows, V vocab_size. A function changes logits, or forbids tokens by setting their logits to -inf. Each option is a
field of `Sampling` and has a function here under its name, which is left out when the option is at its default.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.options import Sampling, changed


@dataclass(frozen=True)
class Past:
    """The ids that each row has so far."""

    prompts: Sequence[Sequence[int]]
    written: Sequence[Sequence[int]]  # what follows the prompt
    eos_id: int
    stop_ids: Sequence[int] = ()  # what else ends a text

    def seen(self) -> list[list[int]]:
        """Prompt and text of each row."""
        return [[*prompt, *new] for prompt, new in zip(self.prompts, self.written, strict=True)]


# Functions of logits and past, applied whether the next token is drawn or the likeliest is taken. (B, V) -> (B, V)


def add_logit_bias(logits: Tensor, bias: Iterable[tuple[int, float]], past: Past) -> Tensor:
    """Add a number to the logits of some ids."""
    logits = logits.clone()
    for i, number in bias:
        logits[:, i] += number
    return logits


def penalize_repetition(logits: Tensor, penalty: float, past: Past) -> Tensor:
    """Divide positive and multiply negative logits of tokens in prompt or text (https://arxiv.org/abs/1909.05858).

    penalty = 2 turns the logits 3 and -3 of such tokens into 1.5 and -6.
    """
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(_counts(past.seen(), logits) > 0, lowered, logits)


def penalize_frequency(logits: Tensor, penalty: float, past: Past) -> Tensor:
    """Subtract the penalty for each time that the text has the token; the prompt does not count."""
    return logits - penalty * _counts(past.written, logits)


def penalize_presence(logits: Tensor, penalty: float, past: Past) -> Tensor:
    """Subtract the penalty once if the text has the token; the prompt does not count."""
    return logits - penalty * (_counts(past.written, logits) > 0)


def forbid_repeated_ngrams(logits: Tensor, n: int, past: Past) -> Tensor:
    """Forbid tokens that would repeat n in a row (https://arxiv.org/abs/1705.04304): n = 2 after 5 6 7 5 forbids 6."""
    logits = logits.clone()
    for row, ids in zip(logits, past.seen(), strict=True):
        begun = ids[len(ids) - n + 1 :]
        row[[ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == begun]] = -math.inf
    return logits


def forbid_early_end(logits: Tensor, n: int, past: Past) -> Tensor:
    """Forbid the ids that end a text while it has fewer than n tokens."""
    logits = logits.clone()
    for row, ids in zip(logits, past.written, strict=True):
        if len(ids) < n:
            row[[past.eos_id, *past.stop_ids]] = -math.inf
    return logits


def _counts(rows: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """How often each row has each id, (B, V)."""
    counts = [torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=logits.size(1)) for ids in rows]
    return torch.stack(counts).to(logits.device)


# Functions of logits alone, applied where the next token is drawn. (B, V) -> (B, V)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; first shift the largest logit to 0, so that it stays finite."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest, and all that tie with the k-th: k = 2 turns [1, 3, 2] into [-inf, 3, 2]."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p, at least one (https://arxiv.org/abs/1904.09751).

    With probabilities [0.5, 0.3, 0.2], p = 0.7 keeps the first two.
    """
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    dropped = probabilities.cumsum(-1) - probabilities >= p  # what all likelier tokens reach together
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens with at least this share of the likeliest one's probability (https://arxiv.org/abs/2407.01082).

    With probabilities [0.5, 0.3, 0.2], share = 0.5 keeps the first two.
    """
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < share * probabilities.amax(-1, keepdim=True), -math.inf)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the mean surprise, until their probabilities reach p.

    Surprise is the negative log-probability, its mean the entropy (https://arxiv.org/abs/2202.00666). The likeliest
    token may be dropped.
    """
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)  # 0 · -inf counts as 0
    distance = (logprobs + entropy).abs()
    ordered, order = distance.sort(stable=True)
    reached = logprobs.exp().gather(-1, order).cumsum(-1)
    last = (reached < p).sum(-1, keepdim=True).clamp(max=logits.size(-1) - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -math.inf)


# By option, in the order of application, which is that of transformers.
PENALTIES: dict[str, Callable[[Tensor, Any, Past], Tensor]] = {
    "logit_bias": add_logit_bias,
    "repetition_penalty": penalize_repetition,
    "frequency_penalty": penalize_frequency,
    "presence_penalty": penalize_presence,
    "no_repeat_ngram_size": forbid_repeated_ngrams,
    "min_new_tokens": forbid_early_end,
    "banned_ids": lambda logits, ids, past: add_logit_bias(logits, [(i, -math.inf) for i in ids], past),
    "ignore_eos": lambda logits, on, past: add_logit_bias(logits, [(past.eos_id, -math.inf)], past),
}
FILTERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "temperature": apply_temperature,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical,
}


def apply_penalties(logits: Tensor, sampling: Sampling, past: Past) -> Tensor:
    """Apply the options that also matter when the likeliest token is taken.  (B, V) -> (B, V)"""
    for name, value in changed(sampling, PENALTIES).items():
        logits = PENALTIES[name](logits, value, past)
    return logits


def apply_filters(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply the options that matter only when the next token is drawn.  (B, V) -> (B, V)"""
    for name, value in changed(sampling, FILTERS).items():
        logits = FILTERS[name](logits, value)
    return logits


def draw(weights: Tensor, uniform: Sequence[float]) -> Tensor:
    """Where each row's cumulative probability passes its number in [0, 1).  (B, V) -> ids (B,)

    With probabilities [0.5, 0.3, 0.2], 0.6 draws id 1. A row needs one number per token, so what it draws does not
    depend on the other rows. Weights need only be proportional to the probabilities, and not all 0.
    """
    reached = weights.cumsum(-1)
    at = torch.tensor(uniform, dtype=reached.dtype, device=reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, at, right=True)[:, 0]  # right: never a token of probability 0


def as_double(logits: Tensor) -> Tensor:
    """Logits in double precision, on the CPU where the device has none."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def penalized(logits: Tensor, sampling: Sampling, past: Past) -> Tensor:
    """Logits as doubles, with all penalties.  (B, V) -> (B, V)

    Raises UserError when a logit is NaN or inf.
    """
    return checked(apply_penalties(as_double(logits), sampling, past))


def checked(logits: Tensor) -> Tensor:
    """The same logits.  Raises UserError when one is NaN or inf; a forbidden token has -inf."""
    if not bool((logits < math.inf).all()):
        raise UserError("the logits are not finite numbers: a penalty is too large, or the model's training failed")
    return logits


def uniform(generator: random.Random) -> float:
    """A number in [0, 1) with 48 bits: even the largest, times a total, never rounds to that total in a double."""
    return generator.getrandbits(48) / 2**48


def choose(logits: Tensor, sampling: Sampling, past: Past, generators: Sequence[random.Random]) -> list[int | None]:
    """The next id of each row, None where every token is forbidden.  (B, V) -> B ids

    Raises UserError when a logit is NaN or inf.
    """
    logits = penalized(logits, sampling, past)
    best, ids = logits.max(-1)
    if sampling.temperature > 0:
        ids = draw(apply_filters(logits, sampling).softmax(-1), [uniform(generator) for generator in generators])
    pairs = zip(ids.tolist(), best.tolist(), strict=True)
    return [None if value == -math.inf else i for i, value in pairs]
