"""Training speed on a quiet machine and next to busy programs, by how the threads of a product wait for each other.

    python -m benchmarks.busy                  # the model of params.yaml, all cores, two busy programs

Ways to wait: `ours` is what tinygpt/threads.py sets, `libgomp` is libgomp's default, `passive` sleeps at once. Each
way runs for some seconds, quiet and busy, round after round; the table has medians in tokens per second.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from tinygpt.errors import program
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner

WAYS: dict[str, dict[str, str]] = {
    "ours": {},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
BUSY = "while True: pass"


@contextmanager
def busy(n: int) -> Iterator[None]:
    """A context in which n other programs compute all the time."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for started in programs:
            started.kill()
            started.wait()


def measured(way: str, seconds: float) -> float:
    """Tokens per second of training in a process of its own, whose threads wait this way."""
    environment = {key: value for key, value in os.environ.items() if key not in OWN} | WAYS[way]
    command = [sys.executable, "-m", "benchmarks.busy", "--measure", str(seconds)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def tokens_per_second(seconds: float) -> float:
    """Speed of training steps on random tokens, after one to warm up."""
    model_params, params, runtime = load_params(ModelParams, TrainParams, RuntimeParams)
    config = GPTConfig(**config_fields(model_params), vocab_size=load_params(TokenizerParams).vocab_size)
    learner = Learner(GPT(config), params, runtime, device=open_device(runtime))
    ids = torch.randint(config.vocab_size, (params.batch_size, config.block_size + 1), device=learner.device)
    learner.learn(0, ids)
    n_step, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        learner.learn(n_step, ids)
        n_step += 1
    return n_step * params.batch_size * config.block_size / taken


@program
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--programs", type=int, default=2, help="busy ones")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(tokens_per_second(args.measure))
        return
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for n in (0, args.programs):
            for way in WAYS:
                with busy(n):
                    found.setdefault((way, n), []).append(measured(way, args.seconds))
    print(f"| threads wait | quiet | next to {args.programs} busy programs |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | " + " | ".join(f"{median(found[way, n]):,.0f}" for n in (0, args.programs)) + " |")


if __name__ == "__main__":
    main()
