"""Learning rate and dropout as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from tinygpt.train.config import TrainParams

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
