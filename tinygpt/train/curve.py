"""How far a run has come: its steps, its best look at the validation split, and the curve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tinygpt.errors import UserError
from tinygpt.train.config import TrainParams
from tinygpt.train.schedules import lr_frac_at

MAX_ROWS = 1000  # of the curve, about: a longer run averages more steps into a row
MAX_SKIPPED = 30  # steps in a row without an update in fp16; each halves the scale of the loss, 65,536 at first

Row = dict[str, float | None]


@dataclass
class Progress:
    """What a checkpoint keeps beside tensors."""

    step: int = 0  # optimizer steps done
    rows: list[Row] = field(default_factory=list)  # the curve
    norms: list[dict[str, float]] = field(default_factory=list)  # of gradients by part, at each look
    samples: list[dict[str, Any]] = field(default_factory=list)  # texts written on the way
    best_step: int = 0
    best_val_loss: float | None = None
    seconds: float = 0.0  # spent in training, over all attempts
    peak_mem_gib: float = 0.0  # of the process that had the most, over all attempts
    loss_sum: float = 0.0  # since the last row of the curve
    grad_norm_sum: float = 0.0
    n_summed: int = 0
    n_skipped: int = 0  # the last steps whose gradient overflowed, of fp16: they changed no weight
    n_skipped_summed: int = 0  # all of them since the last row of the curve
    micro_batch_size: int | None = None  # that was found for runtime.micro_batch_size=auto

    def count(self, step: int, loss: float, grad_norm: float, params: TrainParams) -> None:
        """Take in the numbers of one step, the next after those before; some steps make a row.

        Raises UserError when a number is not finite; in fp16 the gradient may overflow now and then.
        """
        skipped = params.precision == "fp16" and not math.isfinite(grad_norm)
        self.n_skipped = self.n_skipped + 1 if skipped else 0
        if self.n_skipped > MAX_SKIPPED:
            raise UserError(
                f"the gradient of step {step} overflows float16, as in the {MAX_SKIPPED} steps before, whatever the "
                "loss is scaled by: set train.precision=bf16 or fp32, or lower train.lr (the last checkpoint is kept)"
            )
        if not (math.isfinite(loss) and (skipped or math.isfinite(grad_norm))):
            raise UserError(
                f"loss {loss} and gradient norm {grad_norm} at step {step}: lower train.lr or train.grad_clip, or "
                "lengthen train.warmup_steps (the last good checkpoint is kept)"
            )
        self.loss_sum += loss
        self.grad_norm_sum += 0.0 if skipped else grad_norm
        self.n_summed += 1
        self.n_skipped_summed += skipped
        if step % row_every(params) == 0 or step == params.max_steps:
            self._add_row(step, params)

    def look(self, val_loss: float, params: TrainParams) -> None:
        """Note the validation loss after the last step counted."""
        if self.n_summed:
            self._add_row(self.step, params)
        self.rows[-1]["val_loss"] = val_loss

    def latest(self, params: TrainParams) -> Row:
        """Means since the last row of the curve, or that row."""
        return self._row(self.step, params) if self.n_summed else self.rows[-1]

    def _row(self, step: int, params: TrainParams) -> Row:
        n_stepped = self.n_summed - self.n_skipped_summed
        return {
            "step": step,
            "train_loss": self.loss_sum / self.n_summed,
            "val_loss": None,
            "lr": params.lr * lr_frac_at(step - 1, params),
            "grad_norm": self.grad_norm_sum / n_stepped if n_stepped else None,
        }

    def _add_row(self, step: int, params: TrainParams) -> None:
        self.rows.append(self._row(step, params))
        self.loss_sum, self.grad_norm_sum, self.n_summed, self.n_skipped_summed = 0.0, 0.0, 0, 0


def row_every(params: TrainParams) -> int:
    """Steps between two rows of the curve."""
    return math.ceil(params.max_steps / MAX_ROWS)
