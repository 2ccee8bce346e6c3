"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from tinygpt.train.config import TrainParams

# From progress after the warmup, 0 to 1, to a share between the peak (1) and the minimum (0).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # https://arxiv.org/abs/1608.03983
    "constant": lambda progress: 1.0,
}


def lr_at(step: int, params: TrainParams) -> float:
    """Learning rate of step 0, 1, … max_steps - 1: never 0 at first, the peak after the warmup, the minimum at last."""
    if step < params.warmup_steps:
        return params.lr * (step + 1) / (params.warmup_steps + 1)
    progress = (step - params.warmup_steps) / max(1, params.max_steps - 1 - params.warmup_steps)
    share = SCHEDULES[params.schedule](progress)
    return params.lr * (params.min_lr_frac + (1 - params.min_lr_frac) * share)


def dropout_frac_at(step: int, params: TrainParams) -> float:
    """Share of model.dropout at step `step`, counted from 0: one, or down to zero over the run."""
    return 1 - step / params.max_steps if params.anneal_dropout else 1.0
