"""What can be asked of a text that is generated; the names are those of transformers where it has the option."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tinygpt.params import Within, require

NotNegative = Annotated[int, Within("[0, inf)")]
AnyNumber = Annotated[float, Within("(-inf, inf)")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens, and where a text ends.  Each option's default changes nothing."""

    temperature: Annotated[float, Within("[0, inf)")] = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: NotNegative = 0  # only the k likeliest tokens; 0 = all
    top_p: Annotated[float, Within("(0, 1]")] = 1.0  # only the likeliest tokens that together reach this probability
    min_p: Annotated[float, Within("[0, 1]")] = 0.0  # only tokens with this share of the likeliest one's probability
    typical_p: Annotated[float, Within("(0, 1]")] = 1.0  # only tokens as surprising as is usual, to this probability
    repetition_penalty: Annotated[float, Within("(0, inf)")] = 1.0  # divides logits of what prompt and text have
    frequency_penalty: AnyNumber = 0.0  # taken off the logit of a token for each time that the text has it
    presence_penalty: AnyNumber = 0.0  # taken off the logit of a token that the text has
    no_repeat_ngram_size: NotNegative = 0  # no n tokens come twice in prompt and text; 0 = they may
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    banned_ids: tuple[int, ...] = ()  # never taken
    min_new_tokens: NotNegative = 0  # before so many there is no `<|endoftext|>` and none of stop_ids
    ignore_eos: bool = False  # never `<|endoftext|>`: the text goes on
    stop: tuple[str, ...] = ()  # the text ends before the first of these texts
    stop_ids: tuple[int, ...] = ()  # the text ends before these ids, as before `<|endoftext|>`
    when_full: Literal["slide", "stop"] = "slide"  # a full context forgets its older half, or ends the text
    seed: Annotated[int, Within("[0, 4294967295]")] = 0  # the same gives the same text, whatever runs beside it

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        lists = ("logit_bias", "banned_ids", "stop", "stop_ids")  # "ab" would be two texts, "a" and "b"
        require(
            *((isinstance(of(self, name), tuple), f"{name}={of(self, name)!r} must be a tuple") for name in lists),
        )
        require(
            *interval_rules(self),
            (all(self.stop), f"stop={self.stop} has an empty text, which stands before everything: leave it out"),
            (
                all(abs(bias) <= 1e9 for _, bias in self.logit_bias),
                f"logit_bias={self.logit_bias} must be between -1e9 and 1e9; banned_ids forbids a token",
            ),
            (
                self.when_full in ("slide", "stop"),
                f"when_full={self.when_full!r} is not one of 'slide', 'stop'",
            ),
        )

    def check_ids(self, vocab_size: int) -> None:
        """Raise ParamsError where an option names an id that the model has not."""
        named = {
            "logit_bias": [i for i, _ in self.logit_bias],
            "banned_ids": self.banned_ids,
            "stop_ids": self.stop_ids,
        }
        require(
            *(
                (0 <= i < vocab_size, f"{name} has {i}, but the model's ids are 0 to {vocab_size - 1}")
                for name, ids in named.items()
                for i in ids
            )
        )


@dataclass(frozen=True, kw_only=True)
class Search:
    """How many texts to follow at once, and which of them to take."""

    n_beam: Annotated[int, Within("[1, 256]")] = 1  # beam search: the likeliest texts, so many side by side; 1 = none
    length_penalty: Annotated[float, Within("[-10, 10]")] = (
        1.0  # a beam's log-probability is divided by its tokens to this power
    )
    early_stopping: Literal["false", "true", "never"] = "false"  # end with n_beam texts; "never": only when sure
    best_of: Annotated[int, Within("[1, 256]")] = 1  # so many sampled texts, of which the likeliest per token is taken

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        has_beams = self.n_beam > 1
        choices = ("false", "true", "never")
        require(
            *interval_rules(self),
            (self.early_stopping in choices, f"early_stopping={self.early_stopping!r} is not one of {choices}"),
            (
                has_beams or self.length_penalty == 1,
                f"length_penalty={self.length_penalty} is of beam search: it needs n_beam above 1",
            ),
            (
                has_beams or self.early_stopping == "false",
                f"early_stopping={self.early_stopping} is of beam search: it needs n_beam above 1",
            ),
            (not has_beams or self.best_of == 1, f"best_of={self.best_of} samples, n_beam={self.n_beam} does not"),
        )

    @property
    def n_row(self) -> int:
        """How many texts it follows at once."""
        return max(self.n_beam, self.best_of)

    def check(self, sampling: Sampling) -> None:
        """Raise ParamsError where the two contradict each other."""
        off = Sampling()
        drawn = [name for name in ("top_k", "top_p", "min_p", "typical_p") if of(sampling, name) != of(off, name)]
        require(
            (
                self.n_beam == 1 or sampling.temperature == 0,
                f"n_beam={self.n_beam} does not sample: it needs temperature=0, found {sampling.temperature}",
            ),
            *((self.n_beam == 1, f"{name}={of(sampling, name)} is of sampling: n_beam needs it off") for name in drawn),
            (
                self.best_of == 1 or sampling.temperature > 0,
                f"best_of={self.best_of} needs temperature above 0: at 0 all texts are the same",
            ),
        )


def of(options: object, name: str) -> Any:
    """The value of an option."""
    return getattr(options, name)


def interval_rules(options: object) -> list[tuple[bool, str]]:
    """For `require`: each number within the interval that its type names."""
    cls: Any = type(options)
    return [
        (of(options, name) in interval, f"{name}={of(options, name)} must be within {interval.interval}")
        for name, interval in _intervals(cls)
    ]


@functools.cache  # a millisecond each, and a file of prompts makes many
def _intervals(cls: type) -> list[tuple[str, Within]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return [(name, at) for name, hint in hints.items() for at in typing.get_args(hint) if isinstance(at, Within)]


def seed_after(seed: int, n: int) -> int:
    """The n-th seed after one, of 32 bits."""
    return (seed + n) % 2**32
