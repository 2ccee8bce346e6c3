"""One training run: kept alive whatever happens around it, and visible while it lasts."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from torch import Tensor
from tqdm import tqdm

from tinygpt.errors import UserError
from tinygpt.files import write_json
from tinygpt.generate import Sampling, generate
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import CONFIG_FILE, WEIGHTS_FILE
from tinygpt.progress import progress as progress_bar
from tinygpt.progress import shortened
from tinygpt.run.checkpoint import Checkpoints
from tinygpt.run.costs import LESS_MEMORY, find_micro_batch_size, fits, peak_memory
from tinygpt.run.folder import keep_name
from tinygpt.run.loggers import Loggers
from tinygpt.run.processes import Interrupts
from tinygpt.runtime import RuntimeParams, out_of_memory
from tinygpt.tokenizer import Tokenizer
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.parallel import ALONE, World
from tinygpt.train.trainer import TrainState

MODEL_FOLDER = "model"  # in a run's folder: its newest weights, to generate text with


class Run:
    """What a trainer's loop needs around it: checkpoints, signals, logs.  A context manager that holds the lock."""

    def __init__(
        self,
        name: str,
        config: GPTConfig,
        params: TrainParams,
        runtime: RuntimeParams,
        *,
        world: World = ALONE,
        tokenizer: Tokenizer | None = None,
        runs: Path | None = None,
        show: Callable[[TrainState], None] = lambda _: None,
        called: str = "",
    ) -> None:
        """`name` is the run's fingerprint, `called` its name for people, `runs` the folder of all runs.

        `show` publishes the curve so far, at each evaluation and when a run continues.
        Raises UserError when the package of a logger is missing.
        """
        self.config, self.params, self.runtime, self.world = config, params, runtime, world
        self.checkpoints, self.tokenizer = Checkpoints(name, runs=runs), tokenizer
        log_to = runtime.log_to if world.rank == 0 else ()
        self._loggers = Loggers(log_to, self.checkpoints.folder, config, params)
        self._show = show if world.rank == 0 else lambda _: None
        self._clock: tuple[float, int] | None = None  # at the end of this start's first step, which may compile
        self._called = called
        self._interrupts = Interrupts()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.world.first(self._hold)
        self._open.enter_context(self._loggers)
        return self

    def _hold(self) -> None:
        self._open.enter_context(self.checkpoints)
        keep_name(self.checkpoints.folder, self._called)

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(*exception)  # type: ignore[arg-type]

    @contextmanager
    def resumed(self, learner: Learner) -> Iterator[tuple[TrainState, dict[str, Tensor]]]:
        """A context in which the loop continues where the run stopped; yields the state then and the best weights."""
        with out_of_memory(LESS_MEMORY):
            self._check_memory(learner)
            state, best = self._resume(learner)
            if self.runtime.micro_batch_size == "auto":  # found once per run: another size would change the last bits
                state.micro_batch_size = find_micro_batch_size(learner, known=state.micro_batch_size)
                learner.micro_batch_size = state.micro_batch_size
            self._loggers(state)
            self._bar = progress_bar("train", total=self.params.max_steps, unit="steps", start=state.step, lines=False)
            with self._interrupts, self._bar:
                if state.rows:
                    self._show(state)
                yield state, best

    def stop_requested(self) -> int:
        """The number of the signal that asked to save and stop; 0 without one."""
        return self._interrupts.requested()

    def sample(self, model: GPT) -> str:
        """A text written by the model, the same for the same weights."""
        if self.tokenizer is None:
            return ""
        sampling, n = Sampling(seed=self.params.seed), self.params.sample_tokens
        return generate(model, self.tokenizer, "", max_new_tokens=n, sampling=sampling)

    def report(self, state: TrainState, *, evaluated: bool) -> None:
        """Advance the bar, print a line if one is due, and hand new rows of the curve to the loggers."""
        self._loggers(state)
        done = state.step
        if done and self._clock is None:
            self._clock = time.perf_counter(), done
        if evaluated or done % self.runtime.log_every == 0 or done == self.params.max_steps:
            self._bar.write(self._log_line(state))
        if evaluated:
            self._show(state)
            if state.samples and state.samples[-1]["step"] == done:
                if not done and self.params.init_from == "scratch":
                    self._bar.write("before the first step, it writes:")
                self._bar.write(shortened(state.samples[-1]["text"]))
        self._bar.update(min(done, 1))  # not before the first step

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint, in the first process."""
        state.peak_mem_gib = max(state.peak_mem_gib, peak_memory() / 2**30)
        self.world.first(lambda: self._write(state, tensors))

    def _write(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Also make a model folder of `newest_weights`, for `generate --run`: a hard link to the file, not a copy."""
        self.checkpoints.save(state, tensors)
        if self.params.lora is not None or self.tokenizer is None:
            return
        folder = self.checkpoints.folder / MODEL_FOLDER
        folder.mkdir(exist_ok=True)
        self.tokenizer.save(folder)
        write_json(folder / CONFIG_FILE, config_fields(self.config))
        partial = folder / f"{WEIGHTS_FILE}.partial"
        partial.unlink(missing_ok=True)
        weights = self.checkpoints.newest_weights()
        try:
            os.link(weights, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(weights, partial)
        os.replace(partial, folder / WEIGHTS_FILE)

    def _check_memory(self, learner: Learner) -> None:
        """Raises UserError if a step would not fit.  Not checked with several processes."""
        size = min(learner.micro_batch_size or self.params.batch_size, self.params.batch_size)
        if self.world.size == 1 and self.runtime.micro_batch_size != "auto" and not fits(learner, size):
            raise UserError(f"train: a step will not fit into memory: {LESS_MEMORY}")

    def _resume(self, learner: Learner) -> tuple[TrainState, dict[str, Tensor]]:
        found = self.checkpoints.load_latest()
        step = found[0].step if found else 0
        if self.world.max(step) != -self.world.max(-step):
            raise UserError(f"the processes do not find the same checkpoint: all must share {self.checkpoints.folder}")
        if found is None:
            return TrainState(), {}
        state, tensors = found
        best = tensors.pop("best")
        learner.load(tensors)
        print(f"continuing after step {state.step:,} of {self.params.max_steps:,} ({self.checkpoints.folder})")
        if state.is_over(self.params):
            print(f"it is complete: its results are written again; to train afresh, rm -r {self.checkpoints.folder}")
        return state, best

    def _log_line(self, state: TrainState) -> str:
        """What people wait for, in at most 80 columns.  The rest is in the curve."""
        row = state.latest(self.params)
        shown = [f"step {state.step:>6,} of {self.params.max_steps:,}"]
        if row["train_loss"] is not None:
            shown.append(f"train loss {row['train_loss']:.4f}")
        if row["val_loss"] is not None:
            shown.append(f"val loss {row['val_loss']:.4f}")
        if state.step and row["grad_norm"] is None:
            shown.append("gradient overflowed")
        if self._clock is not None and state.step > self._clock[1]:
            seconds = (time.perf_counter() - self._clock[0]) / (state.step - self._clock[1])
            if row["val_loss"] is None:
                shown.append(f"{self.params.batch_size * self.config.block_size / seconds:,.0f} tokens/s")
            shown.append(f"{tqdm.format_interval(seconds * (self.params.max_steps - state.step))} left")
        return "  ".join(shown)
