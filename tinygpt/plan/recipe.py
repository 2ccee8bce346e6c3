"""Our own recipe: which model and training go with a width, a text and a number of steps.

Rates are those that Muon with qk_norm and a linear schedule does best with at widths of 64 to 192, and the same rule
beyond; `benchmarks/scaling.csv` has the runs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.plan.law import Size
from tinygpt.train.config import TrainParams

LAYERS = {64: 2, 96: 3, 128: 4, 192: 5, 256: 6, 384: 8, 512: 10, 768: 12, 1024: 16}  # n_embd: n_layer
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
N_EVALUATIONS = 10
MIN_STEPS = 200  # the fewest of the runs that the law is fitted on
MOST_WEIGHTS = 4  # of the blocks, for each byte of text: the most of those runs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and its training."""

    n_embd: int
    vocab_size: int
    batch_size: int = 8
    max_steps: int
    epochs: float  # how often the text is seen

    def model(self) -> dict[str, Any]:
        """What to set in the group `model`."""
        head_dim = 32 if self.n_embd < 384 else 64
        return {
            "n_layer": LAYERS[self.n_embd],
            "n_head": self.n_embd // head_dim,
            "n_kv_head": None,
            "n_embd": self.n_embd,
            "head_dim": None,
            "n_hidden": None,
            "block_size": self.block_size,
            "window": None,
            "full_every": None,
            "dropout": dropout_for(self.epochs),
        }

    def train(self) -> dict[str, Any]:
        """What to set in the group `train`."""
        wider = math.sqrt(128 / self.n_embd)
        every = max(1, self.max_steps // N_EVALUATIONS)
        return {
            "init_from": "scratch",
            "lora": None,
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "context_warmup": None,
            "optimizer": "muon",
            "lr": rounded(8e-3 * wider),
            "embedding_lr": rounded(0.03 * wider),
            "head_lr": None,
            "vector_lr": None,
            "min_lr_frac": 0.0,
            "warmup_steps": min(max(20, self.max_steps // 100), self.max_steps // 5),
            "schedule": "linear",
            "weight_decay": 0.1,
            "ema": None,
            "patience": None,
            "eval_every": every,
            "save_every": every,
        }

    def values(self) -> dict[str, dict[str, Any]]:
        """What to set in params.yaml, by group and key."""
        return {"tokenizer": {"vocab_size": self.vocab_size}, "model": self.model(), "train": self.train()}

    def config(self, others: ModelParams) -> GPTConfig:
        """The model, with the switches of `others` where the recipe leaves the choice."""
        return GPTConfig(**config_fields(others) | self.model(), vocab_size=self.vocab_size)

    def training(self, others: TrainParams) -> TrainParams:
        """The training, with the values of `others` where the recipe leaves the choice."""
        return dataclasses.replace(others, **self.train())

    @property
    def block_size(self) -> int:
        """Tokens of context: 256 instead of 128 brought nothing in runs of 400 steps."""
        return 128 if self.n_embd < 256 else 256 if self.n_embd < 512 else 512

    @property
    def n_tokens(self) -> int:
        """That it trains on."""
        return self.max_steps * self.batch_size * self.block_size

    def size(self, config: GPTConfig, bytes_per_token: float) -> Size:
        """What decides its loss."""
        return Size(
            n_weights=linear_weights(config),
            n_tokens=self.n_tokens,
            n_unique=self.n_tokens / self.epochs,
            batch_tokens=self.batch_size * self.block_size,
            bytes_per_token=bytes_per_token,
        )


def linear_weights(config: GPTConfig) -> int:
    """Weights of the blocks' matrices and of the head."""
    rows = (0 if config.tie_weights else config.vocab_size) + config.block_size * (config.position == "learned")
    return config.n_weights(config.vocab_size) - config.n_embd * rows


def dropout_for(epochs: float) -> float:
    """What a text needs that is seen so often: without it, the loss rises again after some epochs."""
    return 0.0 if epochs < 2.5 else 0.1 if epochs < 8 else 0.2


def rounded(rate: float) -> float:
    """A learning rate in two digits."""
    return float(f"{rate:.2g}")
