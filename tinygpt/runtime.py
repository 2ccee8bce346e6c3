"""Where and how fast things run: the one group of params.yaml that changes no result, and the device that it names.

PyTorch is imported only when the device is needed: stages that work on text do without it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tinygpt.errors import UserError, is_out_of_memory, shown
from tinygpt.params import Count, ParamsError, Within, require

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    """How to use the machine."""

    group: ClassVar[str] = "runtime"

    device: Literal["auto", "cpu", "cuda", "mps"]  # auto = the first of cuda, mps and cpu that is there
    n_thread: Annotated[int, Within("[0, 1024]")]  # CPU threads for PyTorch and llama.cpp: 0 = all cores
    n_process: Annotated[int, Within("[1, 1024]")]  # that train together, on a GPU each if there are any: 1 = this one
    parallel: Literal["ddp", "fsdp"]  # each process has all weights, or a part of each weight and its state
    n_worker: Annotated[int, Within("[0, 1024]")]  # processes that clean, count and encode text: 0 = one per core
    engine: Literal["process", "ray"]  # what runs them: this machine, or a Ray cluster
    ray_address: str | None  # host:port of a running cluster's head: null = a local one while a stage runs
    micro_batch_size: Count | Literal["auto"] | None  # sequences in one forward pass: null = all of train.batch_size
    gradient_checkpointing: bool  # keep only each block's input and recompute the rest in the backward pass
    compile: bool  # training steps with torch.compile: each takes an eighth less time, after seconds of compiling
    cuda_graphs: bool  # on a GPU, record the compiled forward and backward pass once and replay it
    log_every: Count  # steps between two lines of the training log
    log_to: tuple[
        Literal["tensorboard", "wandb", "mlflow", "dvclive"], ...
    ]  # programs that show the curve; [] for none

    def __post_init__(self) -> None:
        alone = self.n_process == 1 and self.micro_batch_size is None  # else gradients outlive their pass
        require(
            (len(set(self.log_to)) == len(self.log_to), f"runtime.log_to={shown(self.log_to)} has a duplicate"),
            (
                not self.cuda_graphs or (self.compile and alone),
                "runtime.cuda_graphs=true needs compile=true, n_process=1 and micro_batch_size=null",
            ),
            (
                not self.cuda_graphs or self.device in ("auto", "cuda"),
                f"runtime.cuda_graphs=true works only on a GPU, not on runtime.device={self.device}: set it to false",
            ),
            (
                self.n_process == 1 or self.device != "mps",
                "runtime.device=mps works with one process only: set runtime.n_process=1",
            ),
        )


def open_device(runtime: RuntimeParams, *, number: int = 0, of: int = 1) -> torch.device:
    """Set the number of CPU threads and return the device.  Raises ParamsError when the machine does not have them.

    When several processes share a machine, each takes its part of the threads and the GPU of its number.
    """
    import torch

    n_core = os.cpu_count() or 1
    if runtime.n_thread > n_core:
        raise ParamsError(
            [f"runtime.n_thread={runtime.n_thread} is above the {n_core} cores of this machine: 0 uses them all"]
        )
    most = all_threads()
    torch.set_num_threads(max(1, (runtime.n_thread or most) // of))
    name = find_device(runtime.device)
    if of == 1:
        return torch.device(name)
    if name == "mps":
        raise ParamsError(["runtime.device=mps works with one process only: set runtime.n_process=1"])
    if name == "cuda" and of > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ParamsError([f"runtime.n_process: {of} processes on this machine need as many GPUs, found {found}"])
    return torch.device(name, number) if name == "cuda" else torch.device(name)


@functools.cache
def all_threads() -> int:
    """How many threads PyTorch had when a device was first opened: a notebook opens one again and again."""
    import torch

    return torch.get_num_threads()


def find_device(wanted: str, option: str = "runtime.device") -> str:
    """The name of the device; auto is the first there is.  Raises ParamsError that names `option` if it is missing."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if wanted == "auto" else wanted
    if not there[name]:
        raise ParamsError([f"{option}={name} is not available: set it to auto or cpu"])
    return name


@contextmanager
def out_of_memory(cure: str) -> Iterator[None]:
    """A context manager or decorator that turns a lack of memory into a UserError with this cure."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {cure}") from None


@contextmanager
def compiling(cure: str) -> Iterator[None]:
    """A context manager or decorator that turns a failure of torch.compile into a UserError with this cure."""
    log = logging.getLogger("torch._inductor.scheduler")  # where there is no compiler, it prints 40 lines
    log.disabled = True
    try:
        yield
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        cause, *_ = str(getattr(error, "inner_exception", error)).splitlines() or [type(error).__name__]
        cures = f"install g++, set CXX to your compiler, or {cure}"
        raise UserError(f"the step cannot be compiled ({cause}): {cures}") from error
    finally:
        log.disabled = False


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
