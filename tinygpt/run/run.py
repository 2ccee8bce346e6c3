"""One training run: kept alive whatever happens around it, and seen while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from tinygpt.device import out_of_memory
from tinygpt.errors import UserError
from tinygpt.generate import Sampling, generate
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.progress import progress as progress_bar
from tinygpt.run.checkpoint import Checkpoints
from tinygpt.run.loggers import Loggers
from tinygpt.run.memory import LESS_MEMORY, find_micro_batch_size, fits, peak_memory
from tinygpt.run.processes import Interrupts
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import Tokenizer
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner
from tinygpt.train.parallel import ALONE, World
from tinygpt.train.trainer import TrainState


class Run:
    """What a trainer's loop needs around it: checkpoints, signals, logs.  A context manager, which holds the lock."""

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
    ) -> None:
        """`name` is the run's fingerprint, `tokenizer` what its samples are written with; `runs` holds all runs.

        Raises UserError when the package of a logger is missing.
        """
        self.config, self.params, self.runtime, self.world = config, params, runtime, world
        self.checkpoints, self.tokenizer = Checkpoints(name, world, runs=runs), tokenizer
        log_to = runtime.log_to if world.rank == 0 else ()
        self._loggers = Loggers(log_to, self.checkpoints.folder, config, params)
        self._interrupts = Interrupts()
        self._open = ExitStack()

    def __enter__(self) -> Run:
        self._open.enter_context(self.checkpoints)
        self._open.enter_context(self._loggers)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(*exception)  # type: ignore[arg-type]

    def note(self, *, finished: bool) -> None:
        """Say whether its results were published: for `python -m tinygpt runs`."""
        self.checkpoints.note(max_steps=self.params.max_steps, finished=finished)

    @contextmanager
    def resumed(self, learner: Learner) -> Iterator[tuple[TrainState, dict[str, Tensor]]]:
        """A context for the loop, which begins where the run stopped: how far that was, and the best weights so far."""
        with out_of_memory(LESS_MEMORY):
            self._check_memory(learner)
            state, best = self._resume(learner)
            if self.runtime.micro_batch_size == "auto":  # found once a run: another size would change the last bits
                state.micro_batch_size = find_micro_batch_size(learner, known=state.micro_batch_size)
                learner.micro_batch_size = state.micro_batch_size
            self._loggers(state)
            total, start = self.params.max_steps, state.step
            with (
                self._interrupts,
                progress_bar("train", total=total, unit="steps", start=start) as self._bar,
            ):
                yield state, best

    def stop_requested(self) -> int:
        """The number of the signal that asked to save and leave; 0 while none has."""
        return self._interrupts.requested()

    def sample(self, model: GPT) -> str:
        """A text that the model writes, the same for the same weights."""
        if self.tokenizer is None:
            return ""
        sampling, n = Sampling(seed=self.params.seed), self.params.sample_tokens
        return generate(model, self.tokenizer, "", max_new_tokens=n, sampling=sampling)

    def report(self, state: TrainState, *, evaluated: bool) -> None:
        """Move the bar, write a line where one is due, and hand new rows of the curve to the loggers."""
        self._loggers(state)
        done = state.step
        if evaluated or done % self.runtime.log_every == 0 or done == self.params.max_steps:
            self._bar.write(self._log_line(state))
        self._bar.update(min(done, 1))  # not before the first step

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint."""
        state.peak_mem_gib = max(state.peak_mem_gib, peak_memory() / 2**30)
        self.checkpoints.save(state, tensors)

    def _check_memory(self, learner: Learner) -> None:
        """Raises UserError where a step would not fit.  What each of several processes holds is not counted."""
        size = min(learner.micro_batch_size or self.params.batch_size, self.params.batch_size)
        if self.world.size == 1 and self.runtime.micro_batch_size != "auto" and not fits(learner, size):
            raise UserError(f"train: a step will not fit into the memory: {LESS_MEMORY}")

    def _resume(self, learner: Learner) -> tuple[TrainState, dict[str, Tensor]]:
        found = self.checkpoints.load_latest()
        if found is None:
            return TrainState(), {}
        state, tensors = found
        best = tensors.pop("best")
        learner.load(tensors)
        print(f"going on after step {state.step} of {self.params.max_steps} ({self.checkpoints.folder})")
        if state.is_over(self.params):
            print(f"it is over, its results are written again: to train afresh, rm -r {self.checkpoints.folder}")
        return state, best

    def _log_line(self, state: TrainState) -> str:
        row = state.latest(self.params)
        shown = [f"step {state.step:>6,} of {self.params.max_steps:,}"]
        if row["train_loss"] is not None:
            shown.append(f"train loss {row['train_loss']:.4f}")
        if row["val_loss"] is not None:
            shown.append(f"val loss {row['val_loss']:.4f}")
        if state.step:
            norm = "overflowed, no step" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
            tokens_per_s = state.step * self.params.batch_size * self.config.block_size / state.seconds
            shown += [f"lr {row['lr']:.2e}", f"grad norm {norm}", f"{tokens_per_s:,.0f} tokens/s"]
        return "  ".join(shown)
