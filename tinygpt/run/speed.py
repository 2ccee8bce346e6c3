"""The operations of a run, and how fast the device does them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from tinygpt.model.config import GPTConfig
from tinygpt.model.inside import mean_seen
from tinygpt.run.costs import build_trained
from tinygpt.runtime import wait_for
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
    matrices = 3 * linear_weights(config)
    if lora is not None:
        with torch.device("meta"):
            linear = [m.weight for m in build_trained(config, lora).modules() if isinstance(m, nn.Linear)]
        matrices = sum(weight.numel() * (3 if weight.requires_grad else 2) for weight in linear)
    seen = [mean_seen(config.block_size, config.window_of(layer)) for layer in range(config.n_layer)]
    attention = sum(2 * 2 * n * config.n_head * config.head_dim for n in seen)
    return 2 * matrices + 3 * attention


def linear_weights(config: GPTConfig) -> int:
    """Weights of the blocks' matrices and of the head."""
    rows = (0 if config.tie_weights else config.vocab_size) + config.block_size * (config.position == "learned")
    return config.n_weights(config.vocab_size) - config.n_embd * rows


def step_seconds(learner: Learner, batch_size: int) -> float:
    """The least that a training step on random tokens takes of several, the first of which does not count."""
    config = learner.model.config
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=learner.device)
    return min(_times(lambda: learner.learn(0, ids), learner.device))


def tokens_per_second(learner: Learner) -> float:
    """Tokens that training steps of the run's own size take in a second."""
    batch_size = learner.params.batch_size
    return batch_size * learner.model.config.block_size / step_seconds(learner, batch_size)


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
