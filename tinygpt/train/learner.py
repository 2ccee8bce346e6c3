"""A model that learns: one optimizer step of it, and the tensors that this changes.

B batch, T tokens, N sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tinygpt.model import GPT, GPTConfig
from tinygpt.model.lora import add_lora, trained_tensors
from tinygpt.runtime import RuntimeParams
from tinygpt.train.config import TrainParams
from tinygpt.train.ema import EMA
from tinygpt.train.loss import next_token_loss
from tinygpt.train.norms import part_norms
from tinygpt.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr
from tinygpt.train.schedules import dropout_frac_at, lr_frac_at


class Learner:
    """The model of a run, its optimizers, and the average of its weights where there is one."""

    def __init__(
        self,
        config: GPTConfig,
        params: TrainParams,
        runtime: RuntimeParams,
        *,
        device: torch.device,
        base: dict[str, Tensor] | None = None,
    ) -> None:
        """`base` has the weights to start from, by name; without it they come from the seed."""
        self.params, self.device = params, device
        self.micro_batch_size = runtime.micro_batch_size
        self.model = GPT(config, generator=torch.Generator().manual_seed(params.seed)).to(device)
        if base is not None:
            self.model.load_state_dict(base, strict=False)  # a tied head is not in it
        if params.lora is not None:
            seed = torch.Generator().manual_seed(params.seed)
            add_lora(self.model, **dataclasses.asdict(params.lora), generator=seed)
        self.optimizers = build_optimizers(self.model, params)
        self.ema = EMA(params.ema) if params.ema else None
        self.precision = pick_precision(params.precision, device)
        self._train_loss = torch.compile(self._loss, dynamic=False) if runtime.compile else self._loss
        self.part_norms: dict[str, Tensor] = {}  # of the last step's gradient, before clipping

    def learn(self, step: int, ids: Tensor) -> Tensor:
        """One optimizer step, counted from 0, on (B, T + 1) ids.  -> (2,): its loss and its gradient's norm"""
        set_lr(self.optimizers, lr_frac_at(step, self.params))
        self.model.set_dropout(self.model.config.dropout * dropout_frac_at(step, self.params))
        torch.manual_seed(self.params.seed + 1_000_003 * (step + 1))  # dropout depends on the step, not on the past
        loss = torch.zeros((), device=self.device)
        for part in ids.split(self.micro_batch_size or len(ids)):
            part_loss = self._train_loss(part, training=True) * (len(part) / len(ids))
            part_loss.backward()
            loss += part_loss.detach()
        self.part_norms = part_norms(self.model)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.params.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.ema:
            self.ema.update(step + 1, trained_tensors(self.model))
        return torch.stack([loss, grad_norm])

    @contextmanager
    def looking(self) -> Iterator[GPT]:
        """A context in which the model evaluates, with the average of its weights where there is one."""
        self.model.eval()
        with self.ema.in_place_of(trained_tensors(self.model)) if self.ema else nullcontext():
            yield self.model
        self.model.train()

    @torch.inference_mode()
    def loss_of(self, ids: Tensor) -> float:
        """(N, T + 1) ids -> mean nats per token"""
        parts = ids.split(self.micro_batch_size or self.params.batch_size)
        return sum(self._loss(part).item() * len(part) for part in parts) / len(ids)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint keeps of it, by part."""
        return {
            "weights": trained_tensors(self.model),
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "ema": self.ema.average if self.ema else {},
        }

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `tensors` gave, into a learner that has made no step."""
        self.model.load_state_dict(tensors["weights"], strict=False)  # a tied head is not in the file
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        if self.ema:
            self.ema.average = {name: tensor.to(self.device) for name, tensor in tensors["ema"].items()}

    def _loss(self, ids: Tensor, *, training: bool = False) -> Tensor:
        """(B, T + 1) ids -> mean nats per token; what training adds to it is no part of the validation loss."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(ids[:, :-1])
        extra = {"label_smoothing": self.params.label_smoothing, "z_loss": self.params.z_loss} if training else {}
        return next_token_loss(logits, ids[:, 1:], **extra)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of products.  "auto" takes bf16 where a GPU has it: most CPUs only emulate it, slowly."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
