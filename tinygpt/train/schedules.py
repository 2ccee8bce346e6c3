"""Learning rate, dropout, context and batch size as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from tinygpt.train.config import TrainParams, Warmup

# From progress after the warmup, 0 to 1, and the share of it that wsd falls in, to a share between the peak (1) and
# the minimum (0).
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, _: 0.5 * (1 + math.cos(math.pi * progress)),  # https://arxiv.org/abs/1608.03983
    "linear": lambda progress, _: 1 - progress,
    "wsd": lambda progress, decay_frac: min(1.0, (1 - progress) / decay_frac),  # https://arxiv.org/abs/2404.06395
    "constant": lambda progress, _: 1.0,
}


def lr_frac_at(step: int, params: TrainParams) -> float:
    """Share of the peak at step 0, 1, … max_steps - 1: never 0 at first, 1 after the warmup, min_lr_frac at last."""
    if step < params.warmup_steps:
        return (step + 1) / (params.warmup_steps + 1)
    progress = (step - params.warmup_steps) / max(1, params.max_steps - 1 - params.warmup_steps)
    share = SCHEDULES[params.schedule](progress, params.decay_frac)
    return params.min_lr_frac + (1 - params.min_lr_frac) * share


def dropout_frac_at(step: int, params: TrainParams) -> float:
    """Share of model.dropout at step `step`, counted from 0: one, or down to zero over the run."""
    return 1 - step / params.max_steps if params.anneal_dropout else 1.0


def doubled_at(step: int, full: int, warmup: Warmup | None) -> int:
    """What a step, counted from 0, has of a number that is doubled over the warmup until it is `full`.

    full 8, warmup {start: 2, steps: 10}  ->  2 at steps 0 to 4, 4 at steps 5 to 9, then 8
    """
    if warmup is None or step >= warmup.steps:
        return full
    return warmup.start << (step * _n_doublings(full, warmup) // warmup.steps)


def doubled_before(step: int, full: int, warmup: Warmup | None) -> int:
    """The sum of `doubled_at` over all steps before this one."""
    if warmup is None:
        return step * full
    n = _n_doublings(full, warmup)
    begins = [-(-i * warmup.steps // n) for i in range(n + 1)]  # first steps of the n + 1 sizes
    return sum(
        (warmup.start << i) * (min(step, end) - begin)
        for i, (begin, end) in enumerate(zip(begins, [*begins[1:], step], strict=True))
        if begin < step
    )


def tokens_before(step: int, params: TrainParams, block_size: int) -> int:
    """Tokens that the steps before this one have as targets; a context warmup does not change their number."""
    return block_size * doubled_before(step, params.batch_size, params.batch_warmup)


def _n_doublings(full: int, warmup: Warmup) -> int:
    return (full // warmup.start).bit_length() - 1
