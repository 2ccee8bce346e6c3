"""The device that PyTorch computes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinygpt.errors import UserError, is_out_of_memory
from tinygpt.params import ParamsError
from tinygpt.runtime import RuntimeParams


def open_device(runtime: RuntimeParams, *, number: int = 0, of: int = 1) -> torch.device:
    """Set the number of CPU threads and return the device.  Raises ParamsError when it is not there.

    Where several processes share a machine, each takes its part of the threads and the GPU of its number.
    """
    n_core = os.cpu_count() or 1
    if runtime.n_thread > n_core:
        raise ParamsError([f"runtime.n_thread={runtime.n_thread}: this machine has {n_core} cores; 0 uses them all"])
    torch.set_num_threads(max(1, (runtime.n_thread or torch.get_num_threads()) // of))
    name = find_device(runtime.device)
    if of == 1:
        return torch.device(name)
    if name == "mps":
        raise ParamsError(["runtime.device=mps works with one process only: set runtime.n_process=1"])
    if name == "cuda" and of > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ParamsError([f"runtime.n_process: {of} processes on this machine need as many GPUs, found {found}"])
    return torch.device(name, number) if name == "cuda" else torch.device(name)


def find_device(wanted: str, option: str = "runtime.device") -> str:
    """The name of the device: for auto the first that is there.  Raises ParamsError, by the option, when none is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if wanted == "auto" else wanted
    if not there[name]:
        raise ParamsError([f"{option}={name} is not available: set it to auto or cpu"])
    return name


@contextmanager
def out_of_memory(cure: str) -> Iterator[None]:
    """A context, or a decorator, in which a lack of memory raises a UserError with its cure."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {cure}") from None


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
