"""How the threads of one product wait for each other: imported before any library that computes.

Threads that have done their share spin until the others have, which saves time on an idle machine. Next to other
programs, they take the processor from the threads that they wait for. A short spin, and then sleep, costs little in
either case (docs/performance.md; https://gcc.gnu.org/onlinedocs/libgomp/Environment-Variables.html).
"""

import math
import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

SPIN = "10000"  # rounds that a waiting thread spins before it sleeps (docs/performance.md); libgomp's own is 300,000
QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))  # cgroup version 2, version 1


def n_cpu() -> int:
    """CPUs that this process may use: those of its affinity, or fewer if its container has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, quota() or allowed))


def quota(files: tuple[Path, Path] = QUOTAS) -> int | None:
    """The CPU time that a container may use, in CPUs, rounded up; None without a limit."""
    newer, older = files
    for parts in ((newer,), (older, older.with_name("cpu.cfs_period_us"))):
        with suppress(OSError, ValueError):
            limit, period = " ".join(part.read_text(encoding="ascii") for part in parts).split()
            return None if limit in ("max", "-1") else math.ceil(int(limit) / int(period))
    return None


def set_waiting(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep soon, and use as many as `n_cpu` says; variables that a user has set stay."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN
    if n_cpu() < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(n_cpu()))


set_waiting(os.environ)
