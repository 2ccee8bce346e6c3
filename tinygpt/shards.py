"""Text in shards: each is processed by itself, on all cores or on a Ray cluster, into a result of its own.

The work is a function that turns a shard into a file or folder, and leaves no other trace. So the results do not depend
on which process computes which shard, and a run that was stopped computes only the shards that are missing.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.code import code_of
from tinygpt.errors import UserError
from tinygpt.files import alone, remove_folder, runs_folder, sha256_json
from tinygpt.progress import progress
from tinygpt.runtime import RuntimeParams
from tinygpt.threads import n_cpu

WORTH_A_WORKER = 8_000_000  # bytes: with fewer, a worker takes longer to start than to work


@dataclass(frozen=True)
class Span:
    """The bytes [begin, end) of a file."""

    path: Path
    begin: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """Spans of one or more files, in order."""

    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(span.size for span in self.spans)


Work = Callable[[Shard, Path], None]  # writes a shard's result to the path, whole or not at all
Jobs = list[tuple[Shard, Path]]


@contextmanager
def shard_results(
    work: Work,
    shards: Sequence[Shard],
    *,
    name: str,
    key: Any,
    code: str,
    runtime: RuntimeParams,
    runs: Path | None = None,
) -> Iterator[list[Path]]:
    """Call work(shard, path) for each shard and yield the paths, in the shards' order.

    The results last as long as the block. When the work fails or the program is killed, they stay in `runs` (None: that
    of this folder), and the next call makes only those that are missing, if `key` and the code of the module `code` are
    the same. `key` is a JSON value that names the data and params that decide the results.
    """
    fingerprint = sha256_json([key, code_of(code)])[:16]
    folder = (runs or runs_folder()) / f"{name}-{fingerprint}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f"{name}.lock"), name):
        for removed in folder.parent.glob(f"{name}-*.partial"):
            shutil.rmtree(removed)
        folder.mkdir(exist_ok=True)
        paths = [folder.absolute() / f"{i:06d}" for i in range(len(shards))]
        missing = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.exists()]
        total, todo = sum(shard.size for shard in shards), sum(shard.size for shard, _ in missing)
        n_worker = min(runtime.n_worker or n_cpu(), len(missing), 1 + todo // WORTH_A_WORKER)
        with progress(name, total=total, unit="B", start=total - todo) as bar:
            for n_bytes in ENGINES[runtime.engine](work, missing, n_worker, runtime) if missing else ():
                bar.update(n_bytes)
        try:
            yield paths
        except UserError:  # another try needs other params, and so another folder
            remove_folder(folder)
            raise
        remove_folder(folder)


def _in_processes(work: Work, jobs: Jobs, n_worker: int, runtime: RuntimeParams) -> Iterator[int]:
    """Work in processes of this machine; yields the bytes of each shard when it is done."""
    if n_worker <= 1:
        for shard, path in jobs:
            work(shard, path)
            yield shard.size
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # fork: ready at once
    with ProcessPoolExecutor(n_worker, mp_context=context, initializer=_leave_with_parent) as pool:
        try:
            yield from _sizes_of_done({pool.submit(work, shard, path): shard.size for shard, path in jobs})
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: lower runtime.n_worker and run again; "
                "finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # and wait: the next call may write the same shards


def _sizes_of_done(sizes: dict[Future[None], int]) -> Iterator[int]:
    for future in as_completed(sizes):
        future.result()  # raises what the work raised
        yield sizes[future]


def _leave_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(work: Work, jobs: Jobs, n_worker: int, runtime: RuntimeParams) -> Iterator[int]:
    """Work on a Ray cluster, which repeats a task if its worker dies; yields each shard's bytes when it is done."""
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError:
        raise UserError("runtime.engine=ray needs Ray: pip install -r requirements-cluster.txt") from None
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # where workers find our code: the same folders as here
    where: dict[str, Any] = {"num_cpus": max(1, n_worker), "include_dashboard": False}
    if runtime.ray_address:
        _must_answer(runtime.ray_address)
        where = {"address": runtime.ray_address}
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(**where, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    try:
        task = ray.remote(max_retries=3)(_call)
        yield from _sizes_of_done({task.remote(work, shard, path).future(): shard.size for shard, path in jobs})
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.shutdown()


def _call(work: Work, shard: Shard, path: Path) -> None:
    work(shard, path)  # which may be a partial, and Ray takes only functions


def _must_answer(address: str) -> None:
    """Raise UserError when nothing listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"runtime.ray_address={address}: no Ray cluster answers ({error})") from None


ENGINES = {"process": _in_processes, "ray": _on_ray}
