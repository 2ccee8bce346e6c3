"""The training loop: resume, step, log, evaluate, save.

B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinygpt.errors import UserError
from tinygpt.model import GPT, GPTConfig
from tinygpt.model.lora import add_lora, merged_tensors, trained_tensors
from tinygpt.progress import progress
from tinygpt.runtime import RuntimeParams
from tinygpt.tokens import TokenIds
from tinygpt.train.batches import Batches
from tinygpt.train.checkpoint import Checkpoints, Progress
from tinygpt.train.config import TrainParams
from tinygpt.train.ema import EMA
from tinygpt.train.interrupts import Interrupts
from tinygpt.train.loss import next_token_loss
from tinygpt.train.norms import part_norms
from tinygpt.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr
from tinygpt.train.schedules import dropout_frac_at, lr_frac_at

MAX_ROWS = 1000  # of the curve, about: a longer run averages more steps into a row


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `signal` is the number of the signal that asked."""

    def __init__(self, signal: int, message: str) -> None:
        self.signal = signal
        super().__init__(message)


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    progress: Progress
    last: dict[str, Tensor]  # weights after the last step
    best: dict[str, Tensor]  # weights of lowest validation loss
    trained: dict[str, Tensor]  # of these, what was trained: the same, or adapters


class Trainer:
    """One run.  `Trainer(…).fit()` goes on from the newest checkpoint, to the last step."""

    def __init__(
        self,
        config: GPTConfig,
        params: TrainParams,
        runtime: RuntimeParams,
        *,
        train_tokens: TokenIds,
        val_tokens: TokenIds,
        checkpoints: Checkpoints,
        device: torch.device,
        write_sample: Callable[[GPT], str],
        base: dict[str, Tensor] | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`base` has the weights to start from, by name; without it they come from the seed.

        `watch` is called with the progress at the start and after each step.
        """
        self.params, self.runtime, self.device = params, runtime, device
        self.checkpoints, self.write_sample, self.watch = checkpoints, write_sample, watch
        self.model = GPT(config, generator=torch.Generator().manual_seed(params.seed)).to(device)
        if base is not None:
            self.model.load_state_dict(base, strict=False)  # a tied head is not in it
        if params.lora is not None:
            seed = torch.Generator().manual_seed(params.seed)
            add_lora(self.model, **dataclasses.asdict(params.lora), generator=seed)
        self.optimizers = build_optimizers(self.model, params)
        self.ema = EMA(params.ema) if params.ema else None
        self.batches = Batches(train_tokens, seq_len=config.block_size, batch_size=params.batch_size, seed=params.seed)
        self.val_batch = validation_sequences(val_tokens, config.block_size, params.eval_tokens)
        self.precision = pick_precision(params.precision, device)
        self.train_loss = torch.compile(self._loss, dynamic=False) if runtime.compile else self._loss
        self.row_every = math.ceil(params.max_steps / MAX_ROWS)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.part_norms: dict[str, Tensor] = {}  # of the last step, before clipping

    def fit(self) -> Trained:
        """Train to the last step.  Raises Stopped on request, UserError when the loss is no number any more."""
        self._resume()
        self.watch(self.progress)
        start, max_steps = self.progress.step, self.params.max_steps
        with Interrupts() as interrupts, progress("train", total=max_steps, unit="steps", start=start) as bar:
            for step in range(start, max_steps):
                if self._out_of_patience():
                    break
                began = time.perf_counter()
                self._train_step(step)
                self.progress.step = done = step + 1
                val_loss = self._evaluate() if self._due(done, self.params.eval_every) else None
                if val_loss is not None or self._due(done, self.row_every):
                    self._add_row(val_loss)
                self.progress.seconds += time.perf_counter() - began
                self.watch(self.progress)
                if val_loss is not None or self._due(done, self.runtime.log_every):
                    bar.write(self._log_line())
                finished = done == max_steps or self._out_of_patience()
                if finished or done % self.params.save_every == 0 or interrupts.requested():
                    self._save()
                if interrupts.signal is not None and not finished:
                    raise Stopped(interrupts.signal, f"stopped after step {done}; run it again to go on from there")
                bar.update(1)
        last = {name: tensor.detach() for name, tensor in trained_tensors(self.model).items()}
        last |= self.ema.average if self.ema else {}
        last, best = (merged_tensors(self.model, tensors) for tensors in (last, self.best))
        return Trained(self.progress, last, best, trained=self.best)

    def _resume(self) -> None:
        found = self.checkpoints.load_latest()
        if found is None:
            return
        self.progress, tensors = found
        self.model.load_state_dict(tensors["weights"], strict=False)  # a tied head is not in the file
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        self.best = tensors["best"]
        if self.ema:
            self.ema.average = {name: tensor.to(self.device) for name, tensor in tensors["ema"].items()}
        print(f"going on after step {self.progress.step} of {self.params.max_steps} ({self.checkpoints.folder})")

    def _train_step(self, step: int) -> None:
        set_lr(self.optimizers, lr_frac_at(step, self.params))
        self.model.set_dropout(self.model.config.dropout * dropout_frac_at(step, self.params))
        torch.manual_seed(self.params.seed + 1_000_003 * (step + 1))  # dropout depends on the step, not on the past
        ids = self._to_device(self.batches.batch_at(step))  # (B, T + 1)
        loss = torch.zeros((), device=self.device)
        for part in ids.split(self.runtime.micro_batch_size or len(ids)):
            part_loss = self.train_loss(part, training=True) * (len(part) / len(ids))
            part_loss.backward()
            loss += part_loss.detach()
        self.part_norms = part_norms(self.model)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.params.grad_clip)
        self._count(step, loss.item(), grad_norm.item())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.ema:
            self.ema.update(step + 1, trained_tensors(self.model))

    def _count(self, step: int, loss: float, grad_norm: float) -> None:
        """Add to the sums of the next row.  Raises UserError when a number is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"loss {loss} and gradient norm {grad_norm} at step {step + 1}: lower train.lr or train.grad_clip, or "
                f"lengthen train.warmup_steps (the last good checkpoint stays in {self.checkpoints.folder})"
            )
        self.progress.loss_sum += loss
        self.progress.grad_norm_sum += grad_norm
        self.progress.n_summed += 1

    def _loss(self, ids: Tensor, *, training: bool = False) -> Tensor:
        """(B, T + 1) ids -> mean nats per token; what training adds to it is no part of the validation loss."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(ids[:, :-1])
        extra = {"label_smoothing": self.params.label_smoothing, "z_loss": self.params.z_loss} if training else {}
        return next_token_loss(logits, ids[:, 1:], **extra)

    def _evaluate(self) -> float:
        """Validation loss in nats per token; keeps the best weights and a sample with it."""
        trained = trained_tensors(self.model)
        self.model.eval()
        with self.ema.in_place_of(trained) if self.ema else nullcontext():
            val_loss = self._validation_loss()
            if self.params.sample_tokens:
                text = self.write_sample(self.model)
                self.progress.samples.append({"step": self.progress.step, "text": text})
            best = self.progress.best_val_loss
            if best is None or val_loss < best:
                self.progress.best_val_loss, self.progress.best_step = val_loss, self.progress.step
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
        self.model.train()
        norms = {part: norm.item() for part, norm in self.part_norms.items()}
        self.progress.norms.append({"step": self.progress.step, **norms})
        return val_loss

    @torch.inference_mode()
    def _validation_loss(self) -> float:
        parts = self._to_device(self.val_batch).split(self.runtime.micro_batch_size or self.params.batch_size)
        return sum(self._loss(part).item() * len(part) for part in parts) / len(self.val_batch)

    def _row(self, val_loss: float | None) -> dict[str, float | None]:
        """Means since the last row of the curve, as a row."""
        state = self.progress
        return {
            "step": state.step,
            "train_loss": state.loss_sum / state.n_summed,
            "val_loss": val_loss,
            "lr": self.params.lr * lr_frac_at(state.step - 1, self.params),
            "grad_norm": state.grad_norm_sum / state.n_summed,
        }

    def _add_row(self, val_loss: float | None) -> None:
        state = self.progress
        state.rows.append(self._row(val_loss))
        state.loss_sum, state.grad_norm_sum, state.n_summed = 0.0, 0.0, 0

    def _log_line(self) -> str:
        state = self.progress
        row = self._row(None) if state.n_summed else state.rows[-1]  # between two rows, or at one
        tokens_per_s = state.step * self.params.batch_size * self.batches.seq_len / state.seconds
        val = "" if row["val_loss"] is None else f"  val loss {row['val_loss']:.4f}"
        return (
            f"step {state.step:>6,} of {self.params.max_steps:,}  train loss {row['train_loss']:.4f}{val}"
            f"  lr {row['lr']:.2e}  grad norm {row['grad_norm']:.2f}  {tokens_per_s:,.0f} tokens/s"
        )

    def _save(self) -> None:
        optimizer = optimizer_tensors(self.model, self.optimizers)
        average = self.ema.average if self.ema else {}
        parts = {"weights": trained_tensors(self.model), "optimizer": optimizer, "best": self.best, "ema": average}
        self.checkpoints.save(self.progress, parts)

    def _to_device(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _out_of_patience(self) -> bool:
        waited = self.progress.step - self.progress.best_step
        return self.params.patience is not None and waited >= self.params.patience * self.params.eval_every

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.params.max_steps


def validation_sequences(tokens: TokenIds, seq_len: int, limit: int) -> NDArray[np.int64]:
    """The first tokens of the validation split as sequences one after another, at most about `limit` tokens.

    -> (N, seq_len + 1) ids, N at least 1
    """
    n = max(1, min(limit, len(tokens) - 1) // seq_len)
    places = np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)
    return tokens[places].astype(np.int64)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of products.  "auto" takes bf16 where a GPU has it: most CPUs only emulate it, slowly."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
