"""Requests to stop: SIGINT, SIGTERM, and the death of the DVC that started this program."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

STAGE = b"DVC_STAGE"  # environment: DVC sets it for the command of a stage, which hands it down to all it starts
ELASTIC = b"TORCHELASTIC_RUN_ID"  # environment of the processes that torch's elastic launcher starts


class Interrupts:
    """A context in which a request to stop is noted, for the loop to heed at the end of its step.

    DVC passes no signal on: killed, it leaves its stage behind as an orphan. So the programs above this one are
    watched, as far as DVC. (Linux's PR_SET_PDEATHSIG tells of the nearest alone, which may be a shell.) What a person
    started is not watched: with nohup it may outlive its terminal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._starters = starters()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        if STAGE in os.environb and _adopted(self._starters):
            self.signal = signal.SIGTERM
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> int:
        """The number of the signal that asked to save and leave; 0 while none has."""
        if self.signal is None and starters() != self._starters:
            self.signal = signal.SIGTERM
        return self.signal or 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def starters() -> list[int]:
    """Process ids: this program's, its parent's, and so on up to DVC's.

    Without DVC just the first, and of one of several processes that train together that of their starter.
    """
    pids = [os.getpid()]
    if STAGE in os.environb or ELASTIC in os.environb:
        pids.append(os.getppid())
        while sys.platform == "linux" and _in_stage(pids[-1]):
            pids.append(_parent(pids[-1]))
    return pids


def _in_stage(pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False
    return any(variable.startswith(STAGE + b"=") for variable in variables)


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # "1234 (name, of any characters) S 1233 …"


def _adopted(pids: list[int]) -> bool:
    """Whether DVC was gone before we looked: init, which then takes its place, leads a session of its own."""
    try:
        return len(pids) > 1 and os.getsid(pids[-1]) != os.getsid(pids[-2])
    except OSError:
        return True
