"""The training loop: step, evaluate, save; and how far a run has come, with its curve."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tinygpt.errors import Stopped, UserError
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import merged_tensors, trained_tensors
from tinygpt.train.batches import Batches, on_device, validation_sequences
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.schedules import lr_frac_at

if TYPE_CHECKING:
    from tinygpt.tokens import TokenIds

MAX_ROWS = 1000  # of the curve, approximately: a longer run averages more steps into a row
MAX_SKIPPED = 30  # consecutive steps without an update in fp16; each halves the loss scale

Row = dict[str, float | None]  # of the curve: numbers by name


class Trainer:
    """One run.  `Trainer(…).fit(keeper)` continues from where the run stopped, to the last step."""

    def __init__(self, learner: Learner, *, train_tokens: TokenIds, val_tokens: TokenIds) -> None:
        self.learner, self.world = learner, learner.world
        config, params = learner.config, learner.params
        self.params, self.runtime = params, learner.runtime
        self.batches = Batches(
            train_tokens,
            seq_len=config.block_size,
            batch_size=params.batch_size,
            seed=params.seed,
            context_warmup=params.context_warmup,
            shuffle_documents=params.shuffle_documents,
        )
        self.val_batch = validation_sequences(val_tokens, config.block_size, params.eval_tokens)
        self.state = TrainState()
        self.best: dict[str, Tensor] = {}
        self._uncounted: list[Tensor] = []  # numbers of the last steps, still on the device

    def fit(self, keeper: Keeper) -> Trained:
        """Train to the last step.  Raises Stopped on request, UserError when the loss is no longer finite.

        The weights it starts from can be the best ones, like those of any step, so a base is never made worse.
        """
        with keeper.resumed(self.learner) as (self.state, self.best):
            if not self.state.step:
                began = time.perf_counter()
                with self.world.together():
                    self._evaluate(keeper)
                self.state.seconds += time.perf_counter() - began
                keeper.report(self.state, evaluated=True)
            while not self.state.is_over(self.params):
                began = time.perf_counter()
                step, done = self.state.step, self.state.step + 1
                evaluate, log = self._due(done, self.params.eval_every), self._due(done, self.runtime.log_every)
                self._train_step(step, with_part_norms=evaluate)
                self.state.step = done
                asked = self.world.max(keeper.stop_requested())
                save = done % self.params.save_every == 0 or asked
                if evaluate or log or save:
                    with self.world.together():  # where it diverges, all processes see it
                        self._count()
                        if evaluate:
                            self._evaluate(keeper)
                self.state.seconds += time.perf_counter() - began
                keeper.report(self.state, evaluated=evaluate)
                finished = self.state.is_over(self.params)
                if save or finished:
                    keeper.save(self.state, self.learner.tensors() | {"best": self.best})
                if asked and not finished:
                    raise Stopped(asked, f"train: stopped after step {done}; run it again to continue from there")
        with self.learner.evaluated() as model:
            last, best = (merged_tensors(model, part) for part in (_copied(trained_tensors(model)), self.best))
        return Trained(self.state, last, best, trained=self.best)

    def _train_step(self, step: int, *, with_part_norms: bool) -> None:
        batch = on_device(self.batches.batch_at(step), self.learner.device)
        self._uncounted.append(self.learner.learn(step, batch, with_part_norms=with_part_norms))

    def _count(self) -> None:
        """Add the numbers of the steps since the last call to the curve; waits for the device."""
        first = self.state.step - len(self._uncounted) + 1
        numbers = self.world.sum(torch.stack(self._uncounted)) / self.world.size
        for step, (loss, grad_norm) in enumerate(numbers.tolist(), first):
            self.state.count(step, loss, grad_norm, self.params)
        self._uncounted.clear()

    def _evaluate(self, keeper: Keeper) -> None:
        """Measure the validation loss, keep the best weights, write a sample, note the norms of gradients by part."""
        state = self.state
        with self.learner.evaluated() as model:
            val_loss = self.learner.loss_of(model, torch.from_numpy(self.val_batch).to(self.learner.device))
            if not math.isfinite(val_loss):
                raise _diverged(f"validation loss {val_loss}", state.step)
            if self.params.sample_tokens and self.world.rank == 0:
                state.samples.append({"step": state.step, "text": keeper.sample(model)})
            if state.best_val_loss is None or val_loss < state.best_val_loss:
                state.best_val_loss, state.best_step = val_loss, state.step
                self.best = _copied(trained_tensors(model))
        if norms := {name: _finite(norm.item()) for name, norm in self.learner.part_norms.items()}:
            state.norms.append({"step": state.step, **norms})
        state.evaluated(val_loss, self.params)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.params.max_steps


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


class Keeper(Protocol):
    """What the loop needs from the keeper of the run, which is tinygpt.run.run.Run: it decides no weight."""

    def resumed(self, learner: Learner) -> AbstractContextManager[tuple[TrainState, dict[str, Tensor]]]: ...
    def stop_requested(self) -> int: ...
    def sample(self, model: GPT) -> str: ...
    def report(self, state: TrainState, *, evaluated: bool) -> None: ...
    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None: ...


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    state: TrainState
    last: dict[str, Tensor]  # weights after the last step, or their average
    best: dict[str, Tensor]  # weights with the lowest validation loss
    trained: dict[str, Tensor]  # the trained part of the best: all of it, or adapters


@dataclass
class TrainState:
    """How far a run has come: what a checkpoint keeps besides tensors."""

    step: int = 0  # optimizer steps done
    rows: list[Row] = field(default_factory=list)  # the curve
    norms: list[Row] = field(default_factory=list)  # of gradients by part, at each evaluation
    samples: list[dict[str, Any]] = field(default_factory=list)  # texts written during training
    best_step: int = 0
    best_val_loss: float | None = None
    seconds: float = 0.0  # spent in training, over all attempts
    peak_mem_gib: float = 0.0  # of the first process, over all attempts
    loss_sum: float = 0.0  # since the last row of the curve
    grad_norm_sum: float = 0.0
    n_summed: int = 0
    n_skipped: int = 0  # consecutive steps until now whose gradients overflowed in fp16 and changed no weight
    n_skipped_summed: int = 0  # such steps since the last row of the curve
    micro_batch_size: int | None = None  # found for runtime.micro_batch_size=auto

    def is_over(self, params: TrainParams) -> bool:
        """Whether the last step is done, or train.patience is exhausted."""
        waited = self.step - self.best_step
        return self.step >= params.max_steps or (
            params.patience is not None and waited >= params.patience * params.eval_every
        )

    def count(self, step: int, loss: float, grad_norm: float, params: TrainParams) -> None:
        """Take in the numbers of the next step; several steps make a row.

        Raises UserError when a number is not finite; in fp16 gradients may overflow up to MAX_SKIPPED times in a row.
        """
        skipped = params.precision == "fp16" and not math.isfinite(grad_norm)
        self.n_skipped = self.n_skipped + 1 if skipped else 0
        if self.n_skipped > MAX_SKIPPED:
            raise UserError(
                f"the gradient of step {step} overflows float16, as in the {MAX_SKIPPED} steps before, however the "
                "loss is scaled: set train.precision=bf16 or fp32, or lower train.lr (the last checkpoint is kept)"
            )
        if not (math.isfinite(loss) and (skipped or math.isfinite(grad_norm))):
            raise _diverged(f"loss {loss} and gradient norm {grad_norm}", step)
        self.loss_sum += loss
        self.grad_norm_sum += 0.0 if skipped else grad_norm
        self.n_summed += 1
        self.n_skipped_summed += skipped
        if step % math.ceil(params.max_steps / MAX_ROWS) == 0 or step == params.max_steps:
            self._add_row(step, params)

    def evaluated(self, val_loss: float, params: TrainParams) -> None:
        """Record the validation loss after the last counted step, or before the first."""
        if self.n_summed or not self.rows:
            self._add_row(self.step, params)
        self.rows[-1]["val_loss"] = val_loss

    def latest(self, params: TrainParams) -> Row:
        """Means since the last row of the curve, or that row if there are none."""
        return self._row(self.step, params) if self.n_summed else self.rows[-1]

    def _row(self, step: int, params: TrainParams) -> Row:
        n_stepped = self.n_summed - self.n_skipped_summed
        return {
            "step": step,
            "train_loss": self.loss_sum / self.n_summed if self.n_summed else None,
            "val_loss": None,
            "lr": params.lr * lr_frac_at(step - 1, params) if step else None,
            "grad_norm": self.grad_norm_sum / n_stepped if n_stepped else None,
        }

    def _add_row(self, step: int, params: TrainParams) -> None:
        self.rows.append(self._row(step, params))
        self.loss_sum, self.grad_norm_sum, self.n_summed, self.n_skipped_summed = 0.0, 0.0, 0, 0


def _finite(number: float) -> float | None:
    """The number, or None if it overflowed, as a gradient may in fp16."""
    return number if math.isfinite(number) else None


def _diverged(numbers: str, step: int) -> UserError:
    if not step:
        return UserError(f"{numbers} before the first step: use another base, or set train.init_from=scratch")
    return UserError(
        f"{numbers} at step {step}: lower train.lr or train.grad_clip, or lengthen train.warmup_steps (the last good "
        "checkpoint is kept)"
    )
