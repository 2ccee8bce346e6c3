"""The size of a micro-batch, found by trying it out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from tinygpt.errors import UserError
from tinygpt.model.device import wait_for
from tinygpt.train.learner import Learner
from tinygpt.train.optim import state_bytes
from tinygpt.train.profile import available_memory, memory_of

N_SIZES = 5  # that a CPU tries, from the whole batch down to a sixteenth of it
N_ROUNDS = 3  # that each is timed, the first of them as a warm-up
MEASURE_S = 20.0  # after which no other round begins


def find_micro_batch_size(learner: Learner, *, known: int | None = None) -> int:
    """The largest that fits into a GPU, the fastest on a CPU; a half, a quarter … of the batch. Says what it found.

    Neither weights nor random numbers are touched. `known` is what the run has found before: a CPU takes it, a GPU
    nothing larger. Torch.compile is left out of it, for it would compile each size anew.
    """
    batch_size, device = learner.params.batch_size, learner.device
    sizes = [size for size in halves(batch_size) if known is None or size <= known]
    if known is not None and device.type != "cuda":
        return known
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if device.type == "cuda":
            size, why = _largest_on_gpu(learner, sizes), "the largest that fits"
        else:
            sizes = [size for size in sizes[:N_SIZES] if fits(learner, size)]
            size, why = fastest(sizes, lambda n: _try(learner, n)), f"the fastest of {', '.join(map(str, sizes))}"
    print(f"micro-batches of {size} of the {batch_size} sequences of a step: {why}")
    return size


def halves(n: int) -> list[int]:
    """n, n/2, n/4 … as far as they are whole: 12, 6, 3."""
    sizes = [n]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def fastest(sizes: Iterable[int], attempt: Callable[[int], None]) -> int:
    """The size that takes the least time for each of its sequences, at best of some attempts side by side."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    if not times:
        raise UserError(
            "not even the smallest micro-batch fits into this machine's memory: lower model.block_size or the model, "
            "raise train.batch_size to a power of two, or set runtime.gradient_checkpointing=true"
        )
    began = time.perf_counter()
    for number in range(N_ROUNDS):
        for size, taken in times.items():
            start = time.perf_counter()
            attempt(size)
            taken.append((time.perf_counter() - start) / size)
        if number and time.perf_counter() - began > MEASURE_S:
            break
    return min(times, key=lambda size: min(times[size][1:]))


def largest(sizes: Iterable[int], attempt: Callable[[int], None]) -> int:
    """The first size, from the largest on, that is attempted without running out of the GPU's memory."""
    for size in sizes:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            continue
        return size
    raise UserError(
        "not even the smallest micro-batch fits into the GPU's memory: set runtime.gradient_checkpointing=true, "
        "raise train.batch_size to a power of two, or lower model.block_size or the model"
    )


def _largest_on_gpu(learner: Learner, sizes: list[int]) -> int:
    """Beside as much as the optimizer will take; twice, for the second time the gradients are there already."""
    model, params = learner.model, learner.params
    known = any(optimizer.state for optimizer in learner.optimizers)
    n_bytes = 0 if known else state_bytes(model, params)

    def attempt(size: int) -> None:
        torch.cuda.empty_cache()
        reserved = torch.empty(n_bytes, dtype=torch.uint8, device=learner.device)
        _try(learner, size, times=2)
        del reserved

    return largest(sizes, attempt)


def _try(learner: Learner, size: int, *, times: int = 1) -> None:
    try:
        for _ in range(times):
            learner.rehearse(size)
        wait_for(learner.device)
    finally:
        learner.model.zero_grad()


def fits(learner: Learner, size: int) -> bool:
    """Whether there is memory for a step in micro-batches of that size, beside weights that are there already."""
    needed = memory_of(learner.model.config, learner.params, learner.runtime, size, learner.device)
    return needed.training - needed.weights < available_memory(learner.device)
