"""What changes from step to step: the learning rate, and the share of dropout."""

import math
from collections.abc import Callable

from tinygpt.train.config import TrainParams

# What remains of the way from the peak (1) to the minimum (0), by progress from 0 to 1 and train.decay_frac
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, _: 0.5 * (1 + math.cos(math.pi * progress)),  # https://arxiv.org/abs/1608.03983
    "linear": lambda progress, _: 1 - progress,
    "wsd": lambda progress, decay_frac: min(1.0, (1 - progress) / decay_frac),  # https://arxiv.org/abs/2404.06395
    "constant": lambda progress, _: 1.0,
}


def lr_frac_at(step: int, params: TrainParams) -> float:
    """Share of the peak at step 0, 1, … max_steps - 1: above 0 at first, 1 after the warmup, then as the schedule says.

    All schedules but constant end at min_lr_frac.
    """
    if step < params.warmup_steps:
        return (step + 1) / (params.warmup_steps + 1)
    progress = (step - params.warmup_steps) / max(1, params.max_steps - 1 - params.warmup_steps)
    return params.min_lr_frac + (1 - params.min_lr_frac) * SCHEDULES[params.schedule](progress, params.decay_frac)


def dropout_frac_at(step: int, params: TrainParams) -> float:
    """Share of model.dropout at step `step`, counted from 0: 1, or falling to 0 over the run."""
    return 1 - step / params.max_steps if params.anneal_dropout else 1.0
