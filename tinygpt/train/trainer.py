"""The training loop: resume, step, log, look at the validation split, save.

T tokens, N sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.errors import Stopped, UserError
from tinygpt.model.config import GPTConfig
from tinygpt.model.device import out_of_memory
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import merged_tensors, trained_tensors
from tinygpt.progress import progress
from tinygpt.runtime import RuntimeParams
from tinygpt.tokens import TokenIds
from tinygpt.train.batches import Batches
from tinygpt.train.checkpoint import Checkpoints
from tinygpt.train.config import TrainParams
from tinygpt.train.curve import Progress
from tinygpt.train.distributed import ALONE, World
from tinygpt.train.interrupts import Interrupts
from tinygpt.train.learner import Learner
from tinygpt.train.micro_batch import find_micro_batch_size, fits
from tinygpt.train.prefetch import Prefetch
from tinygpt.train.profile import peak_memory
from tinygpt.train.schedules import tokens_before

LESS_MEMORY = (
    "lower runtime.micro_batch_size or set runtime.gradient_checkpointing=true, then model.block_size or the model"
)


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
        world: World = ALONE,
        write_sample: Callable[[GPT], str],
        base: dict[str, Tensor] | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`base` has the weights to start from, by name; without it they come from the seed.

        `watch` is called with the progress at the start and after each step.
        """
        self.params, self.runtime, self.device, self.world = params, runtime, device, world
        self.checkpoints, self.write_sample, self.watch = checkpoints, write_sample, watch
        self.learner = Learner(config, params, runtime, device=device, world=world, base=base)
        self.batches = Batches(
            train_tokens,
            seq_len=config.block_size,
            batch_size=params.batch_size,
            seed=params.seed,
            batch_warmup=params.batch_warmup,
            context_warmup=params.context_warmup,
            shuffle_documents=params.shuffle_documents,
        )
        self.prefetch = Prefetch(self.batches.batch_at, device)
        self.val_batch = validation_sequences(val_tokens, config.block_size, params.eval_tokens)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._uncounted: list[Tensor] = []  # numbers of the last steps, still on the device

    @out_of_memory(LESS_MEMORY)
    def fit(self) -> Trained:
        """Train to the last step.  Raises Stopped on request, UserError when the loss is no number any more."""
        self._check_memory()
        self._resume()
        if self.runtime.micro_batch_size == "auto":
            self._find_micro_batch_size()
        self.watch(self.progress)
        start, max_steps = self.progress.step, self.params.max_steps
        with (
            Interrupts() as interrupts,
            self.prefetch,
            progress("train", total=max_steps, unit="steps", start=start) as bar,
        ):
            for step in range(start, max_steps):
                if self._out_of_patience():
                    break
                began = time.perf_counter()
                done = step + 1
                look, log = self._due(done, self.params.eval_every), self._due(done, self.runtime.log_every)
                self._train_step(step, look=look)
                self.progress.step = done
                asked = self.world.max(interrupts.requested())
                save = done % self.params.save_every == 0 or asked
                if look or log or save:
                    self._count()
                if look:
                    self._look()
                self.progress.seconds += time.perf_counter() - began
                self.watch(self.progress)
                if look or log:
                    bar.write(self._log_line())
                finished = done == max_steps or self._out_of_patience()
                if save or finished:
                    self._save()
                if asked and not finished:
                    raise Stopped(asked, f"train: stopped after step {done}; run it again to go on from there")
                bar.update(1)
        with self.learner.looking() as model:
            last, best = (merged_tensors(model, part) for part in (_copied(trained_tensors(model)), self.best))
        return Trained(self.progress, last, best, trained=self.best)

    def _check_memory(self) -> None:
        """Raises UserError where a step would not fit.  What each of several processes holds is not counted."""
        size = min(self.learner.micro_batch_size or self.params.batch_size, self.params.batch_size)
        if self.world.size == 1 and self.runtime.micro_batch_size != "auto" and not fits(self.learner, size):
            raise UserError(f"train: a step will not fit into the memory: {LESS_MEMORY}")

    def _resume(self) -> None:
        found = self.checkpoints.load_latest()
        if found is None:
            return
        self.progress, tensors = found
        self.best = tensors.pop("best")
        self.learner.load(tensors)
        print(f"going on after step {self.progress.step} of {self.params.max_steps} ({self.checkpoints.folder})")

    def _find_micro_batch_size(self) -> None:
        """Once a run: another size would change the last bits."""
        self.progress.micro_batch_size = find_micro_batch_size(self.learner, known=self.progress.micro_batch_size)
        self.learner.micro_batch_size = self.progress.micro_batch_size

    def _train_step(self, step: int, *, look: bool) -> None:
        """`look`: the validation split is looked at behind it."""
        self._uncounted.append(self.learner.learn(step, self.prefetch.batch(step), with_part_norms=look))

    def _count(self) -> None:
        """Bring the numbers of the steps since the last time from the device, which waits for it, into the curve."""
        first = self.progress.step - len(self._uncounted) + 1
        numbers = self.world.sum(torch.stack(self._uncounted)) / self.world.size
        for step, (loss, grad_norm) in enumerate(numbers.tolist(), first):
            self.progress.count(step, loss, grad_norm, self.params)
        self._uncounted.clear()

    def _look(self) -> None:
        """Measure the validation loss, keep the best weights, write a sample, note the gradient's norms."""
        state = self.progress
        with self.learner.looking() as model:
            val_loss = self.learner.loss_of(model, self._to_device(self.val_batch))
            if self.params.sample_tokens and self.world.rank == 0:
                state.samples.append({"step": state.step, "text": self.write_sample(model)})
            if state.best_val_loss is None or val_loss < state.best_val_loss:
                state.best_val_loss, state.best_step = val_loss, state.step
                self.best = _copied(trained_tensors(model))
        state.norms.append({"step": state.step, **{k: norm.item() for k, norm in self.learner.part_norms.items()}})
        state.look(val_loss, self.params)

    def _log_line(self) -> str:
        state = self.progress
        row = state.latest(self.params)
        tokens_per_s = tokens_before(state.step, self.params, self.batches.seq_len) / state.seconds
        val = "" if row["val_loss"] is None else f"  val loss {row['val_loss']:.4f}"
        norm = "overflowed, no step" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
        return (
            f"step {state.step:>6,} of {self.params.max_steps:,}  train loss {row['train_loss']:.4f}{val}"
            f"  lr {row['lr']:.2e}  grad norm {norm}  {tokens_per_s:,.0f} tokens/s"
        )

    def _save(self) -> None:
        self.progress.peak_mem_gib = max(self.progress.peak_mem_gib, peak_memory(self.device) / 2**30)
        self.checkpoints.save(self.progress, self.learner.tensors() | {"best": self.best})

    def _to_device(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _out_of_patience(self) -> bool:
        waited = self.progress.step - self.progress.best_step
        return self.params.patience is not None and waited >= self.params.patience * self.params.eval_every

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.params.max_steps


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def validation_sequences(tokens: TokenIds, seq_len: int, limit: int) -> NDArray[np.int64]:
    """The first tokens of the validation split as sequences one after another, at most about `limit` tokens.

    -> (N, seq_len + 1) ids, N at least 1
    """
    n = max(1, min(limit, len(tokens) - 1) // seq_len)
    places = np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)
    return tokens[places].astype(np.int64)
