"""What a run will cost besides memory: weights, operations and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from tinygpt.device import wait_for
from tinygpt.model.config import GPTConfig
from tinygpt.model.parts import mean_seen
from tinygpt.run.memory import build_trained
from tinygpt.train.config import LoRAParams
from tinygpt.train.learner import Learner
from tinygpt.train.loss import PRECISIONS

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # rows of the square matrices that show a device's peak
MEASURE_S = 1.0  # seconds that a measurement takes at least


def flops_per_token(config: GPTConfig, lora: LoRAParams | None = None) -> float:
    """Floating-point operations of training on one token of a full context: three times those of a forward pass.

    Two for each weight of a matrix, and two for each product of queries and keys and of shares and values, of which a
    token has half a context on average, or a window's part of it (Kaplan et al., https://arxiv.org/abs/2001.08361).
    A frozen matrix needs no gradient of its own and counts two times.
    """
    with torch.device("meta"):
        model = build_trained(config, lora)
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = sum(weight.numel() * (3 if weight.requires_grad else 2) for weight in linear)
    seen = [mean_seen(config.block_size, config.window_of(layer)) for layer in range(config.n_layer)]
    attention = sum(2 * 2 * n * config.n_head * config.head_dim for n in seen)
    return 2 * matrices + 3 * attention


def tokens_per_second(learner: Learner) -> float:
    """Measured on training steps with random tokens, the first of which does not count."""
    config, batch_size = learner.model.config, learner.params.batch_size
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=learner.device)
    return batch_size * config.block_size / statistics.median(_times(lambda: learner.learn(0, ids), learner.device))


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product in a run's precision (not auto), the best of several."""
    size = MATMUL_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=PRECISIONS[precision].dtype)
    return 2 * size**3 / min(_times(lambda: a @ a, device))


def _times(action: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds that an action takes, again and again; the first time does not count."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < MEASURE_S:
        began = time.perf_counter()
        action()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return times[1:]
