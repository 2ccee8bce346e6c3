"""Peak memory of training on the CPU, next to what weights, gradients and optimizer state take.

    python -m benchmarks.memory [CASE …]

Every case trains a few steps in a process of its own, in micro-batches of one sequence of random tokens. Sizes are of
the resident set, minus what Python and PyTorch take before the model is built. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.run.costs import memory_of
from tinygpt.run.run import Run
from tinygpt.runtime import RuntimeParams
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.trainer import Trainer, TrainState

MIDDLE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
SWITCHES: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": "all",
    "tie_weights": True,
    "qk_norm": False,
}
CASES: dict[str, tuple[dict[str, Any], str, bool]] = {  # sizes, optimizer, gradient checkpointing
    "middle-adamw": (MIDDLE, "adamw", False),
    "middle-muon": (MIDDLE, "muon", False),
    "gpt2-adamw": (GPT2, "adamw", True),
    "gpt2-muon": (GPT2, "muon", True),
}


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*CASES[args.child])))
        return
    print("| case | weights, gradients, optimizer | peak of steps | times | peak with look and save | times |")
    print("|---|---|---|---|---|---|")
    for case in args.cases or CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--child", case]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        own, steps, all_ = json.loads(said)
        print(f"| {case} | {own:.0f} MB | {steps:.0f} MB | {steps / own:.2f} | {all_:.0f} MB | {all_ / own:.2f} |")


def measure(sizes: dict[str, Any], optimizer: str, recompute: bool) -> tuple[float, float, float]:
    """MB of weights, gradients and optimizer state; peak of steps; peak with an evaluation and a checkpoint."""
    config = GPTConfig(**SWITCHES, **sizes)
    changes = {"optimizer": optimizer, "batch_size": 2, "max_steps": 2, "warmup_steps": 0, "save_every": 2}
    changes |= {"eval_every": 2, "eval_tokens": 1, "sample_tokens": 0, "precision": "fp32"}
    params, runtime = load_params(TrainParams, RuntimeParams)
    params = type(params)(**{**vars(params), **changes})
    runtime = type(runtime)(**{**vars(runtime), "micro_batch_size": 1, "gradient_checkpointing": recompute})
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=8 * config.block_size).astype(np.uint16)
    memory = memory_of(config, params, runtime, 1, torch.device("cpu"))
    peaks: list[float] = []

    class Watched(Run):
        """Notes the peak of the first step."""

        def report(self, state: TrainState, *, evaluated: bool) -> None:
            """As a run does."""
            super().report(state, evaluated=evaluated)
            if state.step == 1:
                peaks.append(status("VmHWM"))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = status("VmRSS")
        with Watched("memory", config, params, runtime) as run:
            cpu = torch.device("cpu")
            learner = Learner(GPT(config), params, runtime, device=cpu)
            Trainer(learner, train_tokens=tokens, val_tokens=tokens).fit(run)
    own = (memory.weights + memory.gradients + memory.optimizer) / 1e6
    return own, peaks[0] - before, status("VmHWM") - before


def status(key: str) -> float:
    """A size in this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024 / 1e6


if __name__ == "__main__":
    main()
