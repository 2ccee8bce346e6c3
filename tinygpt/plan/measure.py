"""What a plan needs to know of the machine: the operations of training, and how fast it does them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import nn

from tinygpt.errors import is_out_of_memory
from tinygpt.model.config import GPTConfig, ModelParams
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_operations
from tinygpt.model.products import fast_products
from tinygpt.plan.recipe import LAYERS, Recipe, linear_weights
from tinygpt.run.costs import build_trained
from tinygpt.runtime import RuntimeParams, wait_for
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.loss import PRECISIONS

MOST_S = 12.0  # after which no other width is measured
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # rows of the square matrices that measure a device's peak
MEASURE_S = 1.0  # seconds of a measurement, at least
BUSY = 0.3  # the plan says so if other programs use more cores than this


def flops_per_token(config: GPTConfig, lora: LoRAParams | None = None) -> float:
    """Floating-point operations of training on one token of a full context: three times those of a forward pass.

    That is two per weight of a matrix, and two per multiplication of queries with keys and of attention weights with
    values. A token sees half a context on average, or less with a window (Kaplan et al.,
    https://arxiv.org/abs/2001.08361). A frozen matrix needs no gradient of its own and counts two times; a head with
    an adapter is one matrix for the loss.
    """
    matrices = 3 * linear_weights(config)
    if lora is not None:
        with torch.device("meta"):
            model = build_trained(config, lora)
            modules = [*model.tok_emb.modules(), *model.blocks.modules()]
            linear = [module.weight for module in modules if isinstance(module, nn.Linear)] + [model.lm_head.weight]
        matrices = sum(weight.numel() * (3 if weight.requires_grad else 2) for weight in linear)
    return 2 * matrices + 3 * attention_operations(config)


def step_seconds(learner: Learner, batch_size: int) -> float:
    """Seconds of the fastest of several training steps on random tokens, after one to warm up."""
    config = learner.model.config
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=learner.device)
    return _least_seconds(lambda: learner.learn(0, ids), learner.device)


def tokens_per_second(learner: Learner) -> float:
    """Training speed in tokens per second, at the run's own batch size."""
    batch_size = learner.params.batch_size
    return batch_size * learner.model.config.block_size / step_seconds(learner, batch_size)


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product in a run's precision (not auto), the best of several."""
    size = MATMUL_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])
    with fast_products(device):
        return 2 * size**3 / _least_seconds(lambda: a @ a, device)


def _least_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < MEASURE_S:
        began = time.perf_counter()
        action()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


@dataclass(frozen=True)
class Speeds:
    """How fast the machine trains, by n_embd."""

    operations: Mapping[int, float]  # per second, in the forward and backward passes
    per_weight: Mapping[int, float]  # seconds per weight of the rest of a step: the optimizer
    busy: float  # cores that other programs used meanwhile

    def step(self, config: GPTConfig, batch_size: int) -> float:
        """Seconds of a training step."""
        n_operations = flops_per_token(config) * batch_size * config.block_size
        beside = between(self.per_weight, config.n_embd) * config.n_weights(config.vocab_size)
        return beside + n_operations / between(self.operations, config.n_embd)


def between(points: Mapping[int, float], at: int) -> float:
    """The value at a width or vocabulary, interpolated between measured ones in logarithms; beyond, the nearest."""
    sizes = sorted(points)
    logs = [math.log(points[size]) for size in sizes]
    return math.exp(np.interp(math.log(at), [math.log(size) for size in sizes], logs))


def measure_speeds(
    model: ModelParams, train: TrainParams, runtime: RuntimeParams, device: torch.device, *, vocab_size: int
) -> Speeds:
    """Time steps of two batch sizes at every second width, from the narrowest up, for about MOST_S at most."""
    began, before = time.perf_counter(), _others_busy()
    operations, per_weight = dict[int, float](), dict[int, float]()
    few, many = (1, 4) if device.type == "cpu" else (8, 64)
    for n_embd in [*LAYERS][::2]:
        recipe = Recipe(n_embd=n_embd, vocab_size=vocab_size, max_steps=1000, epochs=1)
        config = recipe.config(model)
        learner = Learner(GPT(config), recipe.training(train), runtime, device=device)
        try:
            first, second = (step_seconds(learner, size) for size in (few, many))
        except (MemoryError, RuntimeError) as error:
            if not operations or not is_out_of_memory(error):
                raise
            break  # wider ones are judged by the widest that fits
        slope = max(1e-9, (second - first) / (many - few))  # seconds per additional sequence
        operations[n_embd] = flops_per_token(config) * config.block_size / slope
        per_weight[n_embd] = max(1e-12, first - few * slope) / config.n_weights(vocab_size)
        taken = time.perf_counter() - began
        if taken + 16 * second > MOST_S:  # the next one is about four times as much work
            break
    return Speeds(operations, per_weight, (_others_busy() - before) / (time.perf_counter() - began))


def _others_busy() -> float:
    """Seconds of processor time that all other programs have used so far."""
    mine, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    return machine.user + machine.system + machine.nice - mine.user - mine.system
