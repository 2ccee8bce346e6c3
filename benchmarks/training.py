"""Steady training speed beside transformers' GPT-2 and a plain GPT: the same mathematics, tokens and optimizer.

    python -m benchmarks.training              # 0.8 M weights, context 64, batch 12
    python -m benchmarks.training --size large # 10.7 M weights: 6 layers of 384, context 256, batch 8

All three are GPT-2: learned positions, LayerNorm, GELU, biases, a tied head, no dropout; float32, fused AdamW, clipped
gradients. Each takes its turn of a few steps, round after round; a table has the medians of rounds, and the share that
the model's operations are of what the machine's float32 product of two large matrices reaches, measured each round.
Ours is the trainer's own step, its numbers for the curve included. Compiling is not in the times.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT, loss_of
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.device import open_device
from tinygpt.params import load_params
from tinygpt.runtime import RuntimeParams
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.profile import flops_per_token, peak_flops

VOCAB_SIZE = 65  # characters of tiny Shakespeare
GPT2: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": "all",
    "qk_norm": False,
    "tie_weights": True,
}
DERIVED: dict[str, Any] = {"n_kv_head": None, "head_dim": None, "n_hidden": None}
SIZES: dict[str, tuple[dict[str, int], int, int]] = {  # of the model, sequences of a batch, steps of a turn
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 12, 20),
    "large": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 8, 2),
}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "embedding_lr": None, "betas": (0.9, 0.99)}

Step = Callable[[int, Tensor], object]


def ours(config: GPTConfig, batch_size: int, device: torch.device, *, compiled: bool, **changes: Any) -> Step:
    """The learner's step."""
    params, runtime = load_params(TrainParams, RuntimeParams)
    params = dataclasses.replace(params, batch_size=batch_size, **(ADAMW | changes))
    runtime = dataclasses.replace(runtime, compile=compiled, cuda_graphs=compiled and runtime.cuda_graphs)
    return Learner(config, params, runtime, device=device).learn


def plain(config: GPTConfig, batch_size: int, device: torch.device, *, compiled: bool) -> Step:
    """torch.nn's layers in the usual loop."""
    return _usual_step(PlainGPT(config).to(device), loss_of, compiled)


def transformers_gpt2(config: GPTConfig, batch_size: int, device: torch.device, *, compiled: bool) -> Step:
    """GPT2LMHeadModel in the usual loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(theirs)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids).logits
            return logits

    return _usual_step(Logits().to(device), loss_of, compiled)


def _usual_step(model: torch.nn.Module, loss_of: Callable[[torch.nn.Module, Tensor], Tensor], compiled: bool) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(number: int, ids: Tensor) -> None:
        loss(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


RUNS: dict[str, Callable[[GPTConfig, int, torch.device], Step]] = {
    "ours": lambda *args: ours(*args, compiled=False),
    "ours, compiled": lambda *args: ours(*args, compiled=True),
    "ours, compiled, Muon": lambda *args: ours(*args, compiled=True, optimizer="muon", momentum=0.9),
    "transformers": lambda *args: transformers_gpt2(*args, compiled=False),
    "transformers, compiled": lambda *args: transformers_gpt2(*args, compiled=True),
    "plain": lambda *args: plain(*args, compiled=False),
    "plain, compiled": lambda *args: plain(*args, compiled=True),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    sizes, batch_size, n_steps = SIZES[args.size]
    device = open_device(load_params(RuntimeParams))
    fields = dataclasses.replace(load_params(ModelParams), **(GPT2 | DERIVED | sizes))
    config = GPTConfig(**config_fields(fields), vocab_size=VOCAB_SIZE)
    ids = torch.randint(VOCAB_SIZE, (batch_size, config.block_size + 1), device=device)
    steps, first = {}, {}
    for name in args.runs:
        began = time.perf_counter()
        steps[name] = RUNS[name](config, batch_size, device)
        _timed(steps[name], ids, 2)
        first[name] = time.perf_counter() - began
        print(f"{name}: ready after {first[name]:.1f} s", file=sys.stderr)
    peaks: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        peaks.append(peak_flops(device))
        for name, step in steps.items():
            speeds[name].append(n_steps * batch_size * config.block_size / _timed(step, ids, n_steps))
    per_token, peak = flops_per_token(config), median(peaks)
    print(f"\n{torch.get_num_threads()} threads, float32 peak {peak / 1e9:.0f} GFLOP/s (medians of {args.rounds})\n")
    print("| run | tokens a second | share of the peak | seconds to the third step |\n|---|---|---|---|")
    for name, found in speeds.items():
        speed = median(found)
        print(f"| {name} | {speed:,.0f} | {speed * per_token / peak:.0%} | {first[name]:.1f} |")


def _timed(step: Step, ids: Tensor, n_steps: int) -> float:
    began = time.perf_counter()
    for number in range(n_steps):
        step(number, ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
