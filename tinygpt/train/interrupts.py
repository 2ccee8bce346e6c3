"""Requests to stop: SIGINT, SIGTERM, and the death of the program that started this one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupts:
    """A context in which a request to stop is noted, for the loop to heed at the end of its step."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._parent = os.getppid()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        if sys.platform == "linux":  # DVC killed: the kernel sends us SIGTERM, and no orphan goes on training
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to save and leave now."""
        if self.signal is None and os.getppid() != self._parent:
            self.signal = signal.SIGTERM  # the parent is gone, on a system without the kernel's message
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
