"""A model that learns: one optimizer step, and the tensors that it changes.

B batch, T tokens, N sequences.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, trained_tensors
from tinygpt.model.products import fast_products
from tinygpt.runtime import RuntimeParams, compiling
from tinygpt.train.config import TrainParams
from tinygpt.train.loss import Loss, pick_precision, repeatable, set_matmul_precision
from tinygpt.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr
from tinygpt.train.parallel import ALONE, PARALLEL, Parallel, World, gathered, part_of, put, whole
from tinygpt.train.schedules import dropout_frac_at, lr_frac_at

NOT_COMPILED = "do without runtime.compile and adamw8bit"


class Learner:
    """The model of a run, its optimizers, and the average of its weights where there is one."""

    def __init__(
        self,
        model: GPT,
        params: TrainParams,
        runtime: RuntimeParams,
        *,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        """`model` has the weights to start from; it is moved to the device, and frozen if adapters are trained."""
        self.config, self.params, self.runtime = model.config, params, runtime
        self.device, self.world = device, world
        self.micro_batch_size = None if runtime.micro_batch_size == "auto" else runtime.micro_batch_size
        self.model = self._prepared(model)
        if runtime.gradient_checkpointing:
            recompute_blocks(self.model)
        self._parallel = PARALLEL[runtime.parallel]() if world.size > 1 else Parallel()
        self._parallel.split(self.model)
        self.optimizers = build_optimizers(self.model, params)
        self.average: dict[str, Tensor] = {}  # of the weights, for train.ema; empty before it begins
        self.precision = pick_precision(params.precision, device, self.config.n_embd)
        set_matmul_precision(self.precision, device)
        self.scaler = GradScaler(device.type, enabled=self.precision == "fp16")
        extra = {"label_smoothing": params.label_smoothing, "z_loss": params.z_loss}
        self._loss, loss = (Loss(self.model, self.precision, **extra) for _ in range(2))
        if runtime.compile:
            self._compile(loss)
        share = params.batch_size // world.size
        n_rows = min(self.micro_batch_size or share, share)
        example = torch.zeros(1, 1, dtype=torch.long, device=device).expand(n_rows, self.config.block_size + 1)
        with compiling(NOT_COMPILED):
            self._train_loss = self._parallel.wrap(loss, example)
        self.part_norms: dict[str, Tensor] = {}  # of the last gradient they were requested for, before clipping

    @compiling(NOT_COMPILED)
    def learn(self, step: int, ids: Tensor, *, with_part_norms: bool = False) -> Tensor:
        """One optimizer step, counted from 0, on (B, T + 1) ids, the same in every process.

        -> (2,): the mean loss of this process's share, and the norm of the whole gradient
        """
        with repeatable(self.device), fast_products(self.device):
            set_lr(self.optimizers, lr_frac_at(step, self.params))
            self.model.set_dropout(self.config.dropout * dropout_frac_at(step, self.params))
            # dropout depends on the step and the process, not on earlier draws
            torch.manual_seed(self.params.seed + 1_000_003 * (step + 1) + 7_919 * self.world.rank)
            ids = self.world.share(ids)
            loss = torch.zeros((), device=self.device)
            full = self.micro_batch_size or len(ids)
            *parts, last = ids.split(full * self.config.block_size // (ids.size(1) - 1))  # more if they are shorter
            with self._parallel.apart():
                for part in parts:
                    loss += self._backward(part, len(part) / len(ids))
            loss += self._backward(last, len(last) / len(ids))
            for optimizer in self.optimizers:
                self.scaler.unscale_(cast(torch.optim.Optimizer, optimizer))  # it reads the groups' gradients
            if with_part_norms:
                self.part_norms = part_norms(self.model)
            grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.params.grad_clip))
            overflow = self.scaler.is_enabled() and not grad_norm.isfinite()  # in fp16: no step, and a smaller scale
            for optimizer in self.optimizers:
                if not overflow:
                    optimizer.step()
                optimizer.zero_grad()
            self.scaler.update()
            if self.params.ema and step + 1 >= self.params.ema.start:
                self._add_to_average(self.params.ema.decay)
            return torch.stack([loss, grad_norm])

    def rehearse(self, n: int) -> None:
        """Run a forward and backward pass on n sequences of random tokens, not compiled; leaves gradients."""
        ids = torch.randint(self.config.vocab_size, (n, self.config.block_size + 1)).to(self.device)
        with fast_products(self.device):
            self.scaler.scale(self._loss(ids)).backward()

    @contextmanager
    def evaluated(self) -> Iterator[GPT]:
        """A context with the model to evaluate, which has the average of the weights if there is one."""
        weights = trained_tensors(self.model)
        _exchange(self.average, weights)
        try:
            yield self._parallel.whole_model(self.model, self._like).eval()
        finally:
            _exchange(self.average, weights)
        self.model.train()

    @torch.inference_mode()
    def loss_of(self, model: GPT, ids: Tensor) -> float:
        """(N, T + 1) ids -> mean nats per token, without the extra terms of training"""
        loss = Loss(model, self.precision)
        mine = ids[self.world.rank :: self.world.size]
        parts = mine.split(self.micro_batch_size or self.params.batch_size) if len(mine) else ()  # if N < size
        with fast_products(self.device):
            total = torch.tensor(sum(loss(part).item() * len(part) for part in parts), dtype=torch.float64)
        return self.world.sum(total).item() / len(ids)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint keeps of the learner, by part; all processes must call it."""
        scale = {f"loss_scale/{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()}
        state = optimizer_tensors(self.model, self.optimizers) | scale
        parts = {"weights": trained_tensors(self.model), "optimizer": state, "ema": self.average}
        return {part: {name: gathered(tensor) for name, tensor in held.items()} for part, held in parts.items()}

    @compiling(NOT_COMPILED)
    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `tensors` returned, into a learner that has not made a step."""
        weights = trained_tensors(self.model)
        for name, weight in weights.items():
            put(weight, tensors["weights"][name])
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        scale = self.scaler.state_dict()  # empty if it is off
        self.scaler.load_state_dict({key: tensors["optimizer"][f"loss_scale/{key}"].item() for key in scale})
        self.average = {name: part_of(tensor, weights[name]) for name, tensor in tensors["ema"].items()}

    def _prepared(self, model: GPT) -> GPT:
        """The model on the device, with adapters if those are trained."""
        model = model.to(self.device)
        if self.params.lora is not None:
            seed = torch.Generator().manual_seed(self.params.seed)
            add_lora(model, **dataclasses.asdict(self.params.lora), generator=seed)
        return model

    def _like(self) -> GPT:
        """Another model of this kind, with weights still to be set."""
        return self._prepared(GPT(self.config, init=False))

    def _compile(self, loss: Loss) -> None:
        """Compile the loss with torch.compile."""
        if self.model.rope is not None:
            self.model.rope(self.config.block_size)  # build its tables outside the compiled code
        torch._dynamo.config.recompile_limit = 64  # for every length of a context warmup, not only the first 8
        loss.compile(dynamic=False, mode="reduce-overhead" if self.runtime.cuda_graphs else None)

    @torch.no_grad()
    def _add_to_average(self, decay: float) -> None:
        """Let the average follow the weights (Polyak and Juditsky, https://doi.org/10.1137/0330046)."""
        weights = trained_tensors(self.model)
        if not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in weights.items()}
        names = list(self.average)  # after loading, in the file's order
        torch._foreach_lerp_([self.average[n] for n in names], [weights[n] for n in names], 1 - decay)

    def _backward(self, ids: Tensor, share: float) -> Tensor:
        """Add the gradient of `share` times the loss; returns that product."""
        loss: Tensor = self._train_loss(ids) * share
        self.scaler.scale(loss).backward()
        return loss.detach()


def recompute_blocks(model: GPT) -> None:
    """Let each block keep only its input, and compute the rest again in the backward pass, with the same dropout.

    Less memory for a third more operations (Chen et al., https://arxiv.org/abs/1604.06174).
    """
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def part_norms(model: GPT) -> dict[str, Tensor]:
    """The 2-norm of the gradient of each block, and of what comes before and after them, as scalars on the device."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in trained_tensors(model).items():
        if parameter.grad is not None:
            first, second, *_ = name.split(".")
            parts[f"block_{second}" if first == "blocks" else first].append(whole(parameter.grad.norm()))
    return {part: torch.stack(norms).norm() for part, norms in parts.items()}


@torch.no_grad()
def _exchange(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Swap tensors one at a time: a copy of all would take as much memory again."""
    for name, tensor in some.items():
        kept = tensor.clone()
        tensor.copy_(others[name])
        others[name].copy_(kept)
