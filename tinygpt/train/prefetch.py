"""Batches read one step ahead, in a thread: the device does not wait for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Prefetch:
    """A context in which batches are read ahead.  It gives what `batch_at` gives, for any step, on the device.

    The thread ends with the context, however that ends. What `batch_at` raises is raised for the step it belongs to.
    """

    def __init__(self, batch_at: Callable[[int], NDArray[np.int64]], device: torch.device) -> None:
        self._batch_at, self._device = batch_at, device
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def __enter__(self) -> Prefetch:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._ahead = None

    def batch(self, step: int) -> Tensor:
        """The batch of a step, (N, T + 1) ids; begins to read that of the next."""
        assert self._pool is not None, "outside of the context"
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._pool.submit(self._read, step)
        ids = self._ahead[1].result()
        self._ahead = step + 1, self._pool.submit(self._read, step + 1)
        return ids.to(self._device, non_blocking=True)

    def _read(self, step: int) -> Tensor:
        ids = torch.from_numpy(self._batch_at(step))
        return ids.pin_memory() if self._device.type == "cuda" else ids  # only from there is a copy not waited for
