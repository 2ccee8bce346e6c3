"""Our recipe: the model and training for a width, a text and a number of steps, and the loss they reach.

Learning rates are for Muon with qk_norm and a linear schedule. At a width of 128 they are the default's
(docs/trials.md), and they fall with the root of the width. docs/plan.md explains the law of the validation loss, and
benchmarks/scaling_fit.py fits its constants on the runs of benchmarks/scaling.csv.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.train.config import TrainParams

LAYERS = {64: 2, 96: 3, 128: 4, 192: 5, 256: 6, 384: 8, 512: 10, 768: 12, 1024: 16}  # n_embd: n_layer
BATCH_SIZES = (4, 8, 16, 32, 64, 128)
BATCH_TOKENS = 2048  # at least: with half of them, losses were 1 to 3 percent higher after the same time
N_EVALUATIONS = 10
MIN_STEPS = 200  # as in the shortest runs that the law is fitted on
MOST_WEIGHTS = 4  # in the blocks, per byte of text: the most in those runs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and its training."""

    n_embd: int
    vocab_size: int
    batch_size: int = 4
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
            "anneal_dropout": False,
            "eval_every": every,
            "save_every": every,
        }

    def values(self) -> dict[str, dict[str, Any]]:
        """What to set in params.yaml, by group and key."""
        return {"tokenizer": {"vocab_size": self.vocab_size}, "model": self.model(), "train": self.train()}

    def config(self, others: ModelParams) -> GPTConfig:
        """The model, with the switches of `others` where the recipe sets none."""
        return GPTConfig(**config_fields(others) | self.model(), vocab_size=self.vocab_size)

    def training(self, others: TrainParams) -> TrainParams:
        """The training, with the values of `others` where the recipe sets none."""
        return dataclasses.replace(others, **self.train())

    @property
    def block_size(self) -> int:
        """Tokens of context."""
        return 256 if self.n_embd < 512 else 512

    @property
    def n_tokens(self) -> int:
        """Tokens seen in training, counted each time."""
        return self.max_steps * self.batch_size * self.block_size

    def size(self, config: GPTConfig, *, bytes_per_token: float, copied: float) -> Size:
        """What decides its loss, with two properties of the text."""
        return Size(
            n_weights=linear_weights(config) - config.n_embd * self.vocab_size / 2,
            n_all_weights=config.n_weights(config.vocab_size),
            n_tokens=self.n_tokens,
            n_unique=self.n_tokens / self.epochs,
            batch_tokens=self.batch_size * self.block_size,
            bytes_per_token=bytes_per_token,
            copied=copied,
        )


def linear_weights(config: GPTConfig) -> int:
    """Weights of the blocks' matrices and of the head."""
    rows = (0 if config.tie_weights else config.vocab_size) + config.block_size * (config.position == "learned")
    return config.n_weights(config.vocab_size) - config.n_embd * rows


def dropout_for(epochs: float) -> float:
    """Dropout for a text that is seen `epochs` times: without it, the loss rises again after some epochs."""
    return 0.0 if epochs < 2.5 else 0.1 if epochs < 7 else 0.2


def rounded(rate: float) -> float:
    """A learning rate, rounded to two digits."""
    return float(f"{rate:.2g}")


# ---- the law ----

COPY_BYTES = 0.5  # that a token counts for where a text repeats itself, however many it has


@dataclass(frozen=True, kw_only=True)
class Size:
    """What decides the loss of a run, but for the text's difficulty."""

    n_weights: float  # of the blocks' matrices, and half of the head's
    n_all_weights: float
    n_tokens: float  # seen in training, counted each time
    n_unique: float  # tokens of the training text
    batch_tokens: float  # in one step
    bytes_per_token: float
    copied: float  # share of the text that repeats what stands shortly before it


@dataclass(frozen=True, kw_only=True)
class Law:
    """The constants; `loss` is for a text of difficulty 1."""

    weights: float  # A, with weights and bytes in millions
    weights_power: float  # a
    power: float  # b
    start: float  # million bytes of text that the first weights are worth, which are made from counted pairs
    overfit: float  # for as many weights as bytes of text
    repeats: float  # what all epochs after the first are worth together at most, in epochs
    batch: float  # tokens per step of which half count

    def seen(self, size: Size) -> float:
        """Tokens seen in training; those of later epochs count less."""
        again = max(0.0, size.n_tokens / size.n_unique - 1)  # epochs after the first
        return min(size.n_tokens, size.n_unique) + size.n_unique * self.repeats * -math.expm1(-again / self.repeats)

    def loss(self, size: Size) -> float:
        """Bits per byte of validation text of difficulty 1."""
        seen = self.seen(size)
        by_weights = self.weights / (size.n_weights / 1e6) ** self.weights_power
        overfit = self.overfit * math.sqrt(size.n_all_weights / (size.n_unique * size.bytes_per_token))
        by_bytes, by_tokens = (
            (1 + size.batch_tokens / self.batch) / (seen * per_token / 1e6 + self.start)
            for per_token in (size.bytes_per_token, COPY_BYTES)
        )
        new = (by_weights + by_bytes + overfit) ** self.power
        copied = (by_weights + by_tokens + overfit) ** (2 * self.power)
        return (1 - size.copied) * new + size.copied * copied


LAW = Law(weights=1.58, weights_power=0.193, power=0.44, start=0.284, overfit=0.385, repeats=0.715, batch=13_100)


def spread(copied: float) -> float:
    """How far a loss may be from its forecast, as a share of it.

    Forecasts for larger models were off by 4 percent at most on nine texts of the fit and two outside it, and by up to
    10 on another one outside it, of which half repeats itself: docs/trials.md and benchmarks/plan.csv.
    """
    return 0.07 + copied / 10
