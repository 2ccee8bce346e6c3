"""The processes of a run: how several start that train one model together, and how each is asked to stop.

    runtime.n_process: 4                     this machine; torch's elastic launcher starts them
    torchrun … -m stages.train               one machine or several; torchrun has started them

If one is killed, the others are stopped, and all start again from the newest checkpoint.
"""

import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from tinygpt.errors import Stopped, UserError
from tinygpt.params import require
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.train.config import TrainParams
from tinygpt.train.parallel import ALONE, FromFirst, World

RESTARTS = 3  # after killed processes, before giving up
PATIENCE_S = 120  # for a process asked to stop, to finish its step and save a checkpoint


def start(train: Callable[[World], None], runtime: RuntimeParams) -> None:
    """Call `train` in this process, or run this program in `runtime.n_process` new ones that work together."""
    if dist.is_torchelastic_launched():
        _train_with_others(train)
    elif runtime.n_process == 1:
        train(ALONE)
    else:
        sys.exit(_launch(runtime.n_process))


def open_devices(runtime: RuntimeParams, world: World, params: TrainParams) -> torch.device:
    """The device of this process.  Raises UserError if the processes cannot share the work."""
    require(*params.rules_with({"runtime": dataclasses.replace(runtime, n_process=world.size)}))
    device = open_device(runtime, number=world.local_rank, of=world.local_size)
    if runtime.cuda_graphs and device.type != "cuda":
        raise UserError("runtime.cuda_graphs=true needs a GPU: set it to false")
    if device.index is not None:
        torch.cuda.set_device(device)  # FSDP uses the current device, wherever the weights are
    return device


def _train_with_others(train: Callable[[World], None]) -> None:
    """Raises UserError if another process has ended; that one, or its launcher, reports why."""
    world = ALONE
    try:
        world = _join()
        train(world)
    except (FromFirst, Stopped):
        raise
    except Exception as error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise UserError(f"train: another process has ended ({str(error).splitlines()[0]})") from None
        if world.rank:
            sys.stderr = sys.__stderr__
            print(f"train: process {world.rank} has failed:", file=sys.stderr)
        raise


def _launch(n_process: int) -> int:
    """Run this program's command in new processes -> 0, or the exit status of one that failed or was stopped."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # of the launcher: the processes report their own errors
    for _ in range(1 + RESTARTS):
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=n_process,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,  # a restart with the same store would find dead processes' addresses
                shutdown_timeout=PATIENCE_S,
                signals_to_handle="SIGTERM,SIGINT",
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            try:
                elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
                return 0
            except SignalException as stopped:  # the processes have saved and said so
                return 128 + stopped.sigval
            except ChildFailedError as failed:
                statuses = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        killed = {rank: status for rank, status in statuses.items() if status < 0 and status != -signal.SIGTERM}
        if not killed:  # one failed, or was asked to stop before it listened; the others were then stopped
            return max([status for status in statuses.values() if status > 0], default=128 + signal.SIGTERM)
        for rank, status in killed.items():
            print(f"train: process {rank} was killed by signal {-status}", file=sys.stderr)
    raise UserError(f"gave up after {RESTARTS} restarts: run it again to continue from the newest checkpoint")


def _join() -> World:
    """Connect to the other processes.  Only the first one writes to the terminal, until another fails."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, local_size)
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return world


# ---- requests to stop ----

STAGE = "DVC_STAGE"  # environment variable that DVC sets for a stage's command; child processes inherit it


class Interrupts:
    """A context that notes requests to stop; the loop obeys them at the end of its step.

    DVC passes no signals on: if killed, it leaves its stage running as an orphan. So the processes above this one are
    watched, up to DVC. (Linux's PR_SET_PDEATHSIG reports only the nearest, which may be a shell.) Without DVC they are
    not: a run that a person started with nohup may outlive its terminal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._watched = watched()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the others get no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> int:
        """The number of the signal that asked to save and stop; 0 without one."""
        if not self.signal and _orphaned(self._watched):
            self.signal = signal.SIGTERM
        return self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def watched() -> list[psutil.Process]:
    """This program, its parent, and so on up to DVC.

    Without DVC, only this program, and the launcher if several processes train together.
    """
    found = [psutil.Process()]
    if STAGE in os.environ or dist.is_torchelastic_launched():
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
    """Whether the parent of one of them has died, so that it has a new one.

    If DVC died before this program began, the last of them is init, which is in another session.
    """
    try:
        if STAGE in os.environ and len(processes) > 1 and os.getsid(processes[-1].pid) != os.getsid(processes[-2].pid):
            return True
        return any(child.ppid() != parent.pid for child, parent in pairwise(processes))
    except (psutil.Error, OSError):
        return True
