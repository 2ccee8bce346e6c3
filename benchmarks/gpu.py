"""Everything that is measured on one GPU, in one command: a table in the terminal, and the same as JSON.

    python -m benchmarks.gpu --out FOLDER --text tinyshakespeare.txt   # at most 8 minutes
    python -m benchmarks.gpu --out FOLDER --quick                      # some cases of each part, 170 seconds
    python -m benchmarks.gpu --out FOLDER --parts decode --seconds 60

Each part (see benchmarks/gpu_parts.py) is a process of its own and writes each row as soon as it has it. A case that
fails or has no time left gives a row that says so. First, the parts that check results run side by side, while the
timed parts compile what they need and keep it on disk. Then each timed part has the GPU to itself.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import PARTS, Case, Finding, Setup

AT_ONCE = 6  # processes that share the GPU while nothing is timed
SHARED = 0.5  # share of the time, at most, before the GPU belongs to one part at a time
MARGIN_S = 4.0  # for a part to end by itself


def run_part(name: str, setup: Setup, rows: Path) -> None:
    """Write a row for each case of a part."""
    with rows.open("a", encoding="utf-8") as file:
        for case, measure in PARTS[name].cases(setup).items():
            began = time.time()
            for what, value, note in findings(measure, setup.until - began):
                row = {"part": name, "case": case, "what": what, "value": value, "note": note}
                file.write(json.dumps(row | {"seconds": round(time.time() - began, 1)}) + "\n")
                file.flush()
            if torch.cuda.is_available():  # on a CPU nothing is compiled, and collecting garbage takes half a second
                torch.compiler.reset()
                gc.collect()
                from torch._inductor.cudagraph_trees import reset_cudagraph_trees  # as slow as PyTorch

                reset_cudagraph_trees()
                torch.cuda.empty_cache()


def findings(measure: Case, left: float) -> Iterator[Finding]:
    """What a case finds, or why it finds nothing."""
    if left < MARGIN_S:
        yield "left out", "", "no time was left"
        return
    try:
        yield from measure()
    except Exception as error:
        traceback.print_exc()
        said = [line for line in str(error).splitlines() if line.strip()] or [""]
        yield "failed", type(error).__name__, said[0][:300]


class Child:
    """A part in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, until: float, *, warm: bool) -> None:
        self.name, self.until, self.warm = name, until, warm
        kind = "warm" if warm else "rows"
        self.rows, log = args.out / f"{name}.{kind}", args.out / f"{name}.{kind}.log"
        self.rows.write_text("")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--part",
            name,
            "--until",
            str(until),
            "--out",
            str(self.rows),
        ]
        command += ["--text", str(args.text)] if args.text else []
        command += [flag for flag, on in (("--quick", args.quick), ("--tiny", args.tiny), ("--warm", warm)) if on]
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(args.out / "compiled"), "TRITON_CACHE_DIR": str(args.out / "triton")}
        if warm or not PARTS[name].timed:  # others compute next to it
            kept |= {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "6"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | kept, start_new_session=True
            )
        self.log, self.began = log, time.time()
        print(f"{name}{' (compiling)' if warm else ''}: started", file=sys.stderr, flush=True)

    def ended(self) -> bool:
        """Whether it has ended, or is killed because its time is over, along with everything it started."""
        over = self.process.poll() is not None or time.time() > self.until + MARGIN_S
        if over:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return over

    def found(self) -> list[dict[str, Any]]:
        """Its rows, and one more if it failed."""
        rows = [json.loads(line) for line in self.rows.read_text(encoding="utf-8").splitlines()]
        status, seconds = self.process.returncode, round(time.time() - self.began, 1)
        print(f"{self.name}: {seconds:.0f} s, status {status}", file=sys.stderr, flush=True)
        if status:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
            rows.append(
                {
                    "part": self.name,
                    "case": "the process",
                    "what": "ended with",
                    "value": status,
                    "note": lines[-1][:300],
                }
            )
        return rows


def run_together(children: list[tuple[str, bool]], args: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Run AT_ONCE at a time -> the rows of those that do more than compile."""
    waiting, running, rows = list(children), list[Child](), list[dict[str, Any]]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name, warm = waiting.pop(0)
            running.append(Child(name, args, until, warm=warm))
        time.sleep(0.2)
        for child in [child for child in running if child.ended()]:
            running.remove(child)
            found = child.found()
            rows += [] if child.warm else found
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    began = time.time()
    timed = [name for name in args.parts if PARTS[name].timed]
    untimed = [name for name in args.parts if not PARTS[name].timed]
    compiling = [name for name in timed if PARTS[name].compiles and torch.cuda.is_available()]
    shared_until = began + (SHARED if timed else 1.0) * args.seconds
    rows = run_together(
        [*((n, True) for n in compiling), *((n, False) for n in untimed)], args, shared_until - MARGIN_S
    )
    for i, name in enumerate(timed):
        left = began + args.seconds - 2 * MARGIN_S - time.time()
        share = PARTS[name].weight / sum(PARTS[other].weight for other in timed[i:])
        child = Child(name, args, time.time() + max(0.0, left * share), warm=False)
        while not child.ended():
            time.sleep(0.2)
        rows += child.found()
    order = list(args.parts)
    return sorted(rows, key=lambda row: order.index(row["part"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | case | what | value | note |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row[key] for key in ("part", "case", "what", "value", "note")]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def main() -> None:
    """Print the table, or run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.json, gpu.md and the logs")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare; without it the project's own docs are learned")
    parser.add_argument("--seconds", type=float, help="in all (default: 470, or 170 with --quick)")
    parser.add_argument("--quick", action="store_true", help="some cases of each part")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to rehearse on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.seconds = args.seconds or (170.0 if args.quick else 470.0)
    if args.part:
        run_part(args.part, Setup(args.text, args.until, quick=args.quick, tiny=args.tiny, warm=args.warm), args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    rows = measure(args)
    (args.out / "gpu.json").write_text(json.dumps({"seconds": time.time() - began, "rows": rows}, indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(rows) + "\n")
    print(table(rows))
    print(f"\n{len(rows)} rows in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
