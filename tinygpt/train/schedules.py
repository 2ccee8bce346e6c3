"""What changes from step to step: the learning rate, and the share of dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygpt.train.config import TrainParams


@dataclass(frozen=True)
class Schedule:
    """How the learning rate falls after its warmup."""

    decay: Callable[[float], float]  # progress from 0 to 1  ->  a share, from the peak (1) to the minimum (0)
    at_end: bool = False  # falls only over the last train.decay_frac of the steps, after a plateau


SCHEDULES = {
    "cosine": Schedule(lambda progress: 0.5 * (1 + math.cos(math.pi * progress))),  # https://arxiv.org/abs/1608.03983
    "linear": Schedule(lambda progress: 1 - progress),
    "wsd": Schedule(lambda progress: 1 - progress, at_end=True),  # https://arxiv.org/abs/2404.06395
    "constant": Schedule(lambda progress: 1.0),
}


def lr_frac_at(step: int, params: TrainParams) -> float:
    """Share of the peak at step 0, 1, … max_steps - 1: above 0 at first, 1 after the warmup, then as the schedule says.

    All schedules but constant end at min_lr_frac.
    """
    if step < params.warmup_steps:
        return (step + 1) / (params.warmup_steps + 1)
    schedule = SCHEDULES[params.schedule]
    progress = (step - params.warmup_steps) / max(1, params.max_steps - 1 - params.warmup_steps)
    if schedule.at_end:
        progress = max(0.0, 1 - (1 - progress) / params.decay_frac)
    return params.min_lr_frac + (1 - params.min_lr_frac) * schedule.decay(progress)


def dropout_frac_at(step: int, params: TrainParams) -> float:
    """Share of model.dropout at step `step`, counted from 0: 1, or falling to 0 over the run."""
    return 1 - step / params.max_steps if params.anneal_dropout else 1.0
