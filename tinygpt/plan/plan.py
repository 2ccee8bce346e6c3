"""The best recipe for a time, and the shortest time for a loss."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tinygpt.errors import UserError
from tinygpt.model.config import GPTConfig, ModelParams
from tinygpt.plan.measure import Speeds
from tinygpt.plan.recipe import (
    BATCH_SIZES,
    BATCH_TOKENS,
    LAYERS,
    MIN_STEPS,
    MOST_WEIGHTS,
    N_EVALUATIONS,
    Recipe,
    dropout_for,
)
from tinygpt.plan.text import Text
from tinygpt.train.config import TrainParams

LONGEST_S = 30 * 24 * 3600.0  # a month: longer runs are not considered
NOTHING = 0.001  # share of the loss that is not worth any time
SHORTER = 1.2
FORWARD = 1 / 3  # share of a training step's work that a forward pass takes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and what is expected of it."""

    recipe: Recipe
    config: GPTConfig
    bpb: float  # of validation text
    train_s: float
    evaluate_s: float  # of the stage `evaluate`
    others_s: float  # of all other stages together

    @property
    def seconds(self) -> float:
        """Seconds of the whole pipeline."""
        return self.train_s + self.evaluate_s + self.others_s


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What is known about the text and the machine, and the params that a recipe leaves as they are."""

    text: Text
    speeds: Speeds
    model: ModelParams
    train: TrainParams
    others_s: float  # seconds of the stages whose time depends on neither model nor steps
    n_process: int = 1  # that share a batch

    def best(self, seconds: float) -> Plan:
        """The plan with the lowest loss in this time for all stages, or a shorter one if the rest gains almost nothing.

        Raises UserError if the time is too short.
        """
        plan = self._lowest(seconds)
        if not plan:
            least = f"--minutes {math.ceil(self._shortest(math.inf) / 6) / 10:g}"
            raise UserError(f"--minutes {seconds / 60:g} is too short: {MIN_STEPS} steps and all stages need {least}")
        enough = plan.bpb * (1 + NOTHING)
        while (shorter := self._lowest(plan.seconds / SHORTER)) and shorter.bpb <= enough:
            plan = shorter
        return plan

    def _lowest(self, seconds: float) -> Plan | None:
        return min(self._plans(seconds), key=lambda plan: plan.bpb, default=None)

    def _shortest(self, bpb: float) -> float:
        """The shortest time, to a twentieth, in which a plan reaches this loss; a month if none does."""
        short, long = self.others_s, LONGEST_S
        while long / short > 1.05:
            middle = (short * long) ** 0.5
            plan = self._lowest(middle)
            short, long = (short, middle) if plan and plan.bpb <= bpb else (middle, long)
        return long

    def reach(self, bpb: float) -> Plan:
        """The shortest plan for this loss, to a twentieth of its time.  Raises UserError if none reaches it."""
        plan = self._lowest(self._shortest(bpb)) or self.best(LONGEST_S)
        if plan.bpb > bpb:
            most = f"a month on this machine brings {plan.bpb:.2f}; {self.lever(self.best(LONGEST_S))}"
            raise UserError(f"--bpb {bpb:g} of validation text is out of reach: {most}")
        return plan

    def lever(self, plan: Plan) -> str:
        """What would help most, in a sentence: more text or more time."""
        epochs = min(plan.recipe.epochs, max(1.0, plan.recipe.epochs / 4))  # text that is never read brings nothing
        by_text = plan.bpb - self._bpb(dataclasses.replace(plan.recipe, epochs=epochs), plan.config)
        by_time = plan.bpb - self.best(min(LONGEST_S, 4 * plan.seconds)).bpb
        (first, more), (second, less) = sorted([(by_text, "text"), (by_time, "time")], reverse=True)
        seen = f"the text is seen {plan.recipe.epochs:.1f} times"
        gains = f"{more} would bring {first:.2f} bits per byte, four times as much {less} {max(0.0, second):.2f}"
        return f"{seen}: four times as much {gains}"

    def _plans(self, seconds: float) -> Iterator[Plan]:
        """One for each model and batch size, with as many steps as there is time for."""
        measured = min(self.text.difficulty)  # below it, the law knows nothing of the text
        sizes = [size for size in self.text.bytes_per_token if size >= measured]
        for n_embd, vocab_size in itertools.product(LAYERS, sizes):
            shape = Recipe(n_embd=n_embd, vocab_size=vocab_size, max_steps=1000, epochs=1)
            config = shape.config(self.model)
            n_unique = self.text.train_bytes / self.text.bytes_per_token[vocab_size]
            if config.n_weights(0) > MOST_WEIGHTS * self.text.train_bytes and n_embd > min(LAYERS):
                continue
            per_token = self.speeds.step(config, 64) / 64 / shape.block_size * FORWARD
            evaluate_s = per_token * self.text.val_bytes / self.text.bytes_per_token[vocab_size]
            looks_s = (N_EVALUATIONS + 1) * per_token * self.train.eval_tokens
            batch_sizes = [n for n in BATCH_SIZES if n * shape.block_size >= BATCH_TOKENS and n % self.n_process == 0]
            for batch_size in batch_sizes:
                step_s = self.speeds.step(config, batch_size)
                train_s = seconds - self.others_s - evaluate_s
                max_steps = int((train_s - looks_s) / step_s)
                n_tokens = max_steps * batch_size * shape.block_size
                recipe = dataclasses.replace(
                    shape, batch_size=batch_size, max_steps=max_steps, epochs=n_tokens / n_unique
                )
                if max_steps >= MIN_STEPS:
                    yield Plan(
                        recipe=recipe,
                        config=dataclasses.replace(config, dropout=dropout_for(recipe.epochs)),
                        bpb=self._bpb(recipe, config),
                        train_s=train_s,
                        evaluate_s=evaluate_s,
                        others_s=self.others_s,
                    )

    def _bpb(self, recipe: Recipe, config: GPTConfig) -> float:
        per_token = self.text.bytes_per_token[recipe.vocab_size]
        size = recipe.size(config, bytes_per_token=per_token, copied=self.text.copied)
        return self.text.loss(size, recipe.vocab_size)
