"""Tiny Shakespeare by characters, next to a plain GPT trained with nanoGPT's recipe for a CPU.

    python -m benchmarks.shakespeare --text tinyshakespeare.txt

Every run is a process of its own, timed from its start, so imports, building and compiling count. All train on the
first nine tenths of the text and are evaluated on the rest, in windows as long as their context. Evaluations do not
count.

plain   4 layers, 4 heads, width 128, context 64, batch 12, AdamW 1e-3, cosine, 2000 steps, eager: built from
        torch.nn's layers (benchmarks/plain_gpt.py)
short   params.yaml's recipe with 3 layers of 64 and context 128, for the same loss in the least time
long    params.yaml's recipe with 4 layers of 96 and context 256, for the lowest loss in the time that plain takes

Each repetition has a seed of its own; the table has medians of seconds and means of losses.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.plain_gpt import PlainGPT, backward, train_by_params, validation_loss
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.params import load_params
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.train.batches import Batches, validation_sequences
from tinygpt.train.config import TrainParams
from tinygpt.train.loss import pick_precision

GOAL = 1.88  # nats per character
PLAIN_STEPS, PLAIN_LR = 2000, 1e-3
EVERY = 100  # steps between two evaluations of the plain GPT
Changes = tuple[dict[str, Any], dict[str, Any]]  # of model and train
SIZES: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "n_kv_head": None,
    "head_dim": None,
    "n_hidden": None,
}
SHORT: Changes = (
    {"block_size": 128, "n_layer": 3, "n_head": 2, "n_embd": 64},
    {"batch_size": 6, "max_steps": 210, "warmup_steps": 2, "lr": 0.022, "embedding_lr": 0.03},
)
LONG: Changes = (
    {"block_size": 256, "n_layer": 4, "n_head": 3, "n_embd": 96},
    {"batch_size": 6, "max_steps": 1180, "warmup_steps": 20, "lr": 0.012},
)
RECIPES = {"short": SHORT, "long": LONG}


def run_plain(text: Path, began: float, seed: int) -> dict[str, Any]:
    """Train the plain GPT; seconds count from `began`, without evaluations."""
    config, train_ids, val_ids = _read(text, block_size=64)
    params, runtime = load_params(TrainParams, RuntimeParams)
    device = open_device(runtime)
    precision = pick_precision(params.precision, device, config.n_embd)
    torch.manual_seed(seed)
    model = PlainGPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN_LR, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    batches = Batches(train_ids, seq_len=64, batch_size=12, seed=seed)
    rows, reached, uncounted = validation_sequences(val_ids, 64, len(val_ids)), None, 0.0
    for step in range(PLAIN_STEPS):
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / PLAIN_STEPS))
        optimizer.param_groups[0]["lr"] = PLAIN_LR * min(1, (step + 1) / 100) * fall
        backward(model, batches.batch_at(step), precision, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            paused = time.time()
            loss = validation_loss(model.eval(), rows)
            model.train()
            uncounted += time.time() - paused
            if loss <= GOAL and reached is None:
                reached = time.time() - began - uncounted
    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.time() - began - uncounted
    return {"n_params": n_params, "steps": PLAIN_STEPS, "loss": loss, "seconds": seconds, "reached": reached}


def run_recipe(name: str, text: Path, began: float, seed: int) -> dict[str, Any]:
    """Train by params.yaml and the recipe's changes; seconds count from `began`."""
    model_changes, train_changes = RECIPES[name]
    config, train_ids, val_ids = _read(text, **model_changes)
    params, runtime = load_params(TrainParams, RuntimeParams)
    once: dict[str, Any] = {"eval_every": 10**9, "save_every": 10**9, "eval_tokens": 1, "sample_tokens": 0}
    params = replace(params, **once, **train_changes, seed=seed)
    trainer = train_by_params(config, params, runtime, train_ids, val_ids)
    seconds, model = time.time() - began, trainer.learner.model
    rows = validation_sequences(val_ids, config.block_size, len(val_ids))
    loss = validation_loss(model.eval(), rows)
    n_params, reached = model.n_params(), seconds if loss <= GOAL else None
    return {"n_params": n_params, "steps": params.max_steps, "loss": loss, "seconds": seconds, "reached": reached}


def _read(text: Path, **changes: Any) -> Any:
    """The config, and the ids of the first nine tenths and of the rest."""
    characters, ids = np.unique(list(text.read_text(encoding="utf-8")), return_inverse=True)
    ids = ids.astype(np.uint16)
    params = replace(load_params(ModelParams), **(SIZES | changes))
    n_train = len(ids) * 9 // 10
    ring = np.r_[ids[:n_train], ids[:1]]  # begins and ends with the same token, as token files do
    return GPTConfig(**config_fields(params), vocab_size=len(characters)), ring, ids[n_train:]


RUNS: dict[str, Callable[[Path, float, int], dict[str, Any]]] = {
    "plain": run_plain,
    **{name: partial(run_recipe, name) for name in RECIPES},
}


def main() -> None:
    """Print the table, or make one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--repeat", type=int, default=3, help="of each run, with seeds from 1")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(RUNS[args.one](args.text, args.began, args.seed)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.runs}
    command = [sys.executable, "-m", "benchmarks.shakespeare", "--text", str(args.text)]
    for seed in range(1, args.repeat + 1):
        for name in args.runs:
            one = [*command, "--one", name, "--seed", str(seed), "--began", str(time.time())]
            done = subprocess.run(one, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    print(
        f"| run | weights | steps | seconds to {GOAL} | seconds in all | validation loss |\n|---|---|---|---|---|---|"
    )
    for name, results in found.items():
        reached = [r["reached"] for r in results if r["reached"]]
        n_params, steps = results[0]["n_params"], results[0]["steps"]
        loss, seconds = mean(r["loss"] for r in results), median(r["seconds"] for r in results)
        goal = f"{median(reached):.1f}" if len(reached) == len(results) else "–"
        print(f"| {name} | {n_params:,} | {steps} | {goal} | {seconds:.1f} | {loss:.4f} |")


if __name__ == "__main__":
    main()
