"""Requests to stop: SIGINT, SIGTERM, and the death of the DVC that started this program."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from types import FrameType
from typing import Any

import psutil

STAGE = "DVC_STAGE"  # environment: DVC sets it for the command of a stage, which hands it down to all it starts
ELASTIC = "TORCHELASTIC_RUN_ID"  # environment of the processes that torch's elastic launcher starts


class Interrupts:
    """A context in which a request to stop is noted, for the loop to heed at the end of its step.

    DVC passes no signal on: killed, it leaves its stage running as an orphan. So the programs above this one are
    watched, as far as DVC. (Linux's PR_SET_PDEATHSIG reports only the nearest, which may be a shell.) What a person
    started is not watched: with nohup it may outlive its terminal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._watched = watched()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        if STAGE in os.environ and _adopted(self._watched):
            self.signal = signal.SIGTERM
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> int:
        """The number of the signal that asked to save and leave; 0 while none has."""
        if self.signal is None and _orphaned(self._watched):
            self.signal = signal.SIGTERM
        return self.signal or 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def watched() -> list[psutil.Process]:
    """This program, its parent, and so on up to DVC.

    Without DVC only this one; for one of several processes that train together also the launcher that started it.
    """
    found = [psutil.Process()]
    if STAGE in os.environ or ELASTIC in os.environ:
        for parent in found[0].parents():
            found.append(parent)
            if not _in_stage(parent):
                break
    return found


def _in_stage(process: psutil.Process) -> bool:
    try:
        return STAGE in process.environ()
    except psutil.Error:  # it has ended, or is another user's
        return False


def _orphaned(processes: list[psutil.Process]) -> bool:
    """Whether one of them has another parent than before, as its own has died."""
    try:
        return any(child.ppid() != parent.pid for child, parent in pairwise(processes))
    except psutil.Error:
        return True


def _adopted(processes: list[psutil.Process]) -> bool:
    """Whether DVC was gone before this program began: init, which then takes its place, leads a session of its own."""
    try:
        return len(processes) > 1 and os.getsid(processes[-1].pid) != os.getsid(processes[-2].pid)
    except OSError:
        return True
