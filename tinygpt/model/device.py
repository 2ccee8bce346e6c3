"""The device that PyTorch computes on."""

from __future__ import annotations

import torch

from tinygpt.params import ParamsError
from tinygpt.runtime import RuntimeParams


def open_device(runtime: RuntimeParams) -> torch.device:
    """Set the number of CPU threads and return the device.  Raises ParamsError when it is not there."""
    torch.set_num_threads(runtime.n_thread or torch.get_num_threads())
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if runtime.device == "auto" else runtime.device
    if not there[name]:
        raise ParamsError([f"runtime.device={name} is not there: set it to auto or cpu"])
    return torch.device(name)
