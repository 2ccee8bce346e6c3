"""Steady training speed next to transformers' GPT-2 and a plain GPT: the same mathematics, tokens and optimizer.

    python -m benchmarks.training              # 0.8 M weights, context 64, batch 12
    python -m benchmarks.training --size large # 10.7 M weights: 6 layers of 384, context 256, batch 8
    python -m benchmarks.training --size gpt2 --precision bf16 --batch-size 32 # 124 M weights, context 1024: for a GPU

All three are GPT-2: learned positions, LayerNorm, GELU, biases, a tied head, no dropout; the same precision, fused
AdamW, clipped gradients. They take turns of a few steps, round after round. The table has medians over the rounds, and
the model's operations per second as a share of what a product of two large matrices reaches in that precision, measured
each round. Ours is the trainer's own step, including its numbers for the curve. Compiling is not timed.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT, loss_of
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.plan.measure import flops_per_token, peak_flops
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.loss import autocast, set_matmul_precision

GPT2: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": "all",
    "qk_norm": False,
    "tie_weights": True,
}
DERIVED: dict[str, Any] = {"n_kv_head": None, "head_dim": None, "n_hidden": None}
CHARS = 65  # of tiny Shakespeare
SIZES: dict[str, tuple[dict[str, int], int, int, int]] = {  # of the model, vocab_size, batch_size, steps in a turn
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, CHARS, 12, 20),
    "large": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, CHARS, 8, 2),
    "gpt2": ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}, 50_304, 8, 2),  # 50,257, rounded up
}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "embedding_lr": None, "betas": (0.9, 0.99)}

Step = Callable[[int, Tensor], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """What all of them train, and how."""

    config: GPTConfig
    batch_size: int
    precision: Literal["fp32", "tf32", "bf16"]
    device: torch.device


def ours(case: Case, *, compiled: bool, **changes: Any) -> Step:
    """The learner's step."""
    params, runtime = load_params(TrainParams, RuntimeParams)
    params = dataclasses.replace(params, batch_size=case.batch_size, precision=case.precision, **(ADAMW | changes))
    runtime = dataclasses.replace(runtime, compile=compiled, cuda_graphs=compiled and runtime.cuda_graphs)
    return Learner(GPT(case.config), params, runtime, device=case.device).learn


def plain(case: Case, *, compiled: bool) -> Step:
    """torch.nn's layers in the usual loop."""
    return _usual_step(PlainGPT(case.config), case, compiled)


def transformers_gpt2(case: Case, *, compiled: bool) -> Step:
    """GPT2LMHeadModel in the usual loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = case.config
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

    return _usual_step(Logits(), case, compiled)


def _usual_step(model: torch.nn.Module, case: Case, compiled: bool) -> Step:
    model = model.to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(number: int, ids: Tensor) -> None:
        with autocast(case.precision, case.device):
            value = loss(model, ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


RUNS: dict[str, Callable[[Case], Step]] = {
    "ours": partial(ours, compiled=False),
    "ours, compiled": partial(ours, compiled=True),
    "ours, compiled, Muon": partial(ours, compiled=True, optimizer="muon", momentum=0.9),
    "transformers": partial(transformers_gpt2, compiled=False),
    "transformers, compiled": partial(transformers_gpt2, compiled=True),
    "plain": partial(plain, compiled=False),
    "plain, compiled": partial(plain, compiled=True),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--batch-size", type=int, help="in place of that of the size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    sizes, vocab_size, batch_size, n_steps = SIZES[args.size]
    device = open_device(load_params(RuntimeParams))
    set_matmul_precision(args.precision, device)
    fields = dataclasses.replace(load_params(ModelParams), **(GPT2 | DERIVED | sizes))
    config = GPTConfig(**config_fields(fields), vocab_size=vocab_size)
    case = Case(config, args.batch_size or batch_size, args.precision, device)
    ids = torch.randint(vocab_size, (case.batch_size, config.block_size + 1), device=device)
    steps, first = {}, {}
    for name in args.runs:
        began = time.perf_counter()
        steps[name] = RUNS[name](case)
        _timed(steps[name], ids, 2)
        first[name] = time.perf_counter() - began
        print(f"{name}: ready after {first[name]:.1f} s", file=sys.stderr)
    peaks: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        peaks.append(peak_flops(device, args.precision))
        for name, step in steps.items():
            speeds[name].append(n_steps * ids[:, 1:].numel() / _timed(step, ids, n_steps))
    per_token, peak = flops_per_token(config), median(peaks)
    print(f"\n{torch.get_num_threads()} threads, peak of {args.precision} {peak / 1e9:.0f} GFLOP/s")
    print(f"(medians of {args.rounds} rounds)\n")
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
