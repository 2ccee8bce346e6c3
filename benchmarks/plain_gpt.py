"""Validation loss of params.yaml's run next to a plain GPT of the same size, trained with AdamW for the same time.

    dvc repro encode && python -m benchmarks.plain_gpt --curve docs/figures/plain_gpt.csv

The plain GPT is built from torch.nn's own transformer layers, with learned positions, LayerNorm with biases and GELU
as in GPT-2; its head is tied to the embedding if params.yaml ties it. It sees the same tokens in the same order and has
AdamW with the same betas, decay and clipping. It is trained with several learning rates, and the best counts. Only
training is timed, not evaluation. The curve has the validation loss of both by seconds.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tinygpt.errors import program
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.run.run import Run
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.tokens import TokenIds, load_meta, load_tokens
from tinygpt.train.batches import Batches, validation_sequences
from tinygpt.train.config import TrainParams
from tinygpt.train.first_weights import set_first_weights
from tinygpt.train.learner import Learner
from tinygpt.train.loss import autocast, pick_precision
from tinygpt.train.trainer import Trainer

TOKENS_DIR = Path("data/tokens")
N_LOOKS = 20  # evaluations on the validation split during training
WARMUP = 0.05  # share of the time in which the plain GPT's learning rate rises; a cosine to a tenth follows

Curve = list[tuple[float, float]]  # seconds of training, validation loss


class PlainGPT(nn.Module):
    """torch.nn's encoder layers, norm first, under a causal mask."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            dim_feedforward=4 * config.n_embd,
            dropout=0.0,
            activation=lambda x: F.gelu(x, approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(config.n_embd)
        self.layers = nn.TransformerEncoder(layer, config.n_layer, norm=norm, enable_nested_tensor=False)
        for name, parameter in self.named_parameters():  # GPT-2's initial weights
            if parameter.ndim == 2:
                share = math.sqrt(2 * config.n_layer) if name.endswith(("out_proj.weight", "linear2.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / share)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(config.block_size))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)"""
        t = ids.size(1)
        x = self.tok_emb(ids) + self.pos_emb.weight[:t]
        assert isinstance(self.mask, Tensor)
        return self.head(self.layers(x, mask=self.mask[:t, :t], is_causal=True))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T + 1) -> mean nats per token"""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def backward(model: nn.Module, batch: NDArray[np.int64], precision: str, device: torch.device) -> None:
    """Add the gradient of a batch's loss."""
    with autocast(precision, device):
        loss = loss_of(model, torch.from_numpy(batch).to(device))
    loss.backward()


def train_plain(
    config: GPTConfig,
    params: TrainParams,
    batches: Batches,
    val_batch: NDArray[np.int64],
    device: torch.device,
    *,
    lr: float,
    seconds: float,
) -> tuple[nn.Module, int, Curve]:
    """Train for `seconds`, in the precision of params.yaml; return the model, the number of steps and the curve."""
    torch.manual_seed(params.seed)
    model, precision = PlainGPT(config).to(device), pick_precision(params.precision, device, config.n_embd)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "emb" not in n)]
    groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=params.betas, fused=True)
    curve: Curve = [(0.0, validation_loss(model.eval(), val_batch))]
    began, step = time.perf_counter(), 0
    while (gone := (time.perf_counter() - began) / seconds) < 1:
        if gone * N_LOOKS >= len(curve):
            paused = time.perf_counter()
            curve.append((gone * seconds, validation_loss(model.eval(), val_batch)))
            began += time.perf_counter() - paused
        model.train()
        rise = min(1.0, (gone + 1e-3) / WARMUP)
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, gone - WARMUP) / (1 - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
        backward(model, batches.batch_at(step), precision, device)
        nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model.eval(), step, [*curve, (seconds, validation_loss(model.eval(), val_batch))]


@torch.inference_mode()
def validation_loss(model: nn.Module, rows: NDArray[np.int64]) -> float:
    """Mean nats per token over adjacent sequences."""
    parts = torch.from_numpy(rows).to(next(model.parameters()).device).split(8)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / len(rows)


def train_by_params(
    config: GPTConfig, params: TrainParams, runtime: RuntimeParams, train_tokens: TokenIds, val_tokens: TokenIds
) -> Trainer:
    """Make a whole run in a temporary folder -> its trainer after the last step."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder
        with Run("benchmark", config, params, runtime) as run:
            model = GPT(config, generator=torch.Generator().manual_seed(params.seed))
            set_first_weights(model, train_tokens)
            learner = Learner(model, params, runtime, device=open_device(runtime))
            trainer = Trainer(learner, train_tokens=train_tokens, val_tokens=val_tokens)
            trainer.fit(run)
    return trainer


@program
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3], help="of the plain GPT")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="write the validation losses by seconds: a .csv")
    args = parser.parse_args()
    model_params, params, runtime = load_params(ModelParams, TrainParams, RuntimeParams)
    config = GPTConfig(**config_fields(model_params), vocab_size=load_meta(TOKENS_DIR).vocab_size)
    tokens = {split: load_tokens(TOKENS_DIR, split) for split in ("train", "val")}
    rows = validation_sequences(tokens["val"], config.block_size, len(tokens["val"]))
    trainer = train_by_params(config, params, runtime, tokens["train"], tokens["val"])
    seconds = trainer.state.seconds
    trainer.learner.model.eval()
    table = [
        (
            "params.yaml",
            params.lr,
            trainer.learner.model.n_params(),
            params.max_steps,
            validation_loss(trainer.learner.model, rows),
        )
    ]
    share = seconds / params.max_steps
    val_losses = [
        ((row["step"] or 0) * share, row["val_loss"]) for row in trainer.state.rows if row["val_loss"] is not None
    ]
    curves = {"tinygpt": val_losses}
    for lr in args.lrs:
        batches = Batches(tokens["train"], seq_len=config.block_size, batch_size=params.batch_size, seed=params.seed)
        device = trainer.learner.device
        plain, steps, curve = train_plain(config, params, batches, trainer.val_batch, device, lr=lr, seconds=seconds)
        curves[f"plain GPT, lr {lr:g}"] = curve
        n_params = sum(p.numel() for p in plain.parameters())
        table.append(("plain GPT", lr, n_params, steps, validation_loss(plain, rows)))
    print(f"\n| model | lr | weights | steps in {seconds:.0f} s | validation loss (nats per token) |")
    print("|---|---|---|---|---|")
    for name, lr, n_params, steps, loss in table:
        print(f"| {name} | {lr:g} | {n_params:,} | {steps:,} | {loss:.4f} |")
    if args.curve:
        losses = [(name, f"{at:.2f}", f"{loss:.4f}") for name, curve in curves.items() for at, loss in curve]
        pd.DataFrame(losses, columns=["model", "seconds", "val_loss"]).to_csv(args.curve, index=False)


if __name__ == "__main__":
    main()
