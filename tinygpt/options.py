"""The options of a generated text, and the limits of a server: a field each, with type, interval and help.

Flags, chat's settings and the server's requests are made from these fields. Names are those of transformers where it
has the option. Nothing here imports PyTorch.
"""

import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from tinygpt.errors import UserError, shown
from tinygpt.files import human_bytes
from tinygpt.params import Count, ParamsError, Within, require, typed

MOST_BYTES = 20_000_000  # of a prompt or a file of prompts: no model reads so much at a time
NotNegative = Annotated[int, Within("[0, inf)")]
AnyNumber = Annotated[float, Within("(-inf, inf)")]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Options that check and convert their values."""

    def __post_init__(self) -> None:
        """Turn 8.0 into 8 and lists into tuples.  Raises ParamsError with all that is wrong."""
        for name, value in typed(type(self), vars(self)).items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Length(Checked):
    """How much to write."""

    max_new_tokens: Annotated[Count, "at most this many new tokens"] = 200


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How to choose tokens, and where a text ends.  Each option's default changes nothing."""

    temperature: Annotated[float, Within("[0, inf)"), "divide the logits by this; 0 = always the likeliest token"] = 1.0
    top_k: Annotated[NotNegative, "only the k likeliest tokens; 0 = all"] = 0
    top_p: Annotated[float, Within("(0, 1]"), "only the likeliest tokens that together have this probability"] = 1.0
    min_p: Annotated[
        float, Within("[0, 1]"), "only tokens with at least this share of the likeliest one's probability"
    ] = 0.0
    typical_p: Annotated[
        float, Within("(0, 1]"), "only tokens about as surprising as usual, up to this probability"
    ] = 1.0
    repetition_penalty: Annotated[float, Within("(0, inf)"), "divide the logits of tokens in prompt or text"] = 1.0
    frequency_penalty: Annotated[AnyNumber, "subtracted from a token's logit for each time it is in the text"] = 0.0
    presence_penalty: Annotated[AnyNumber, "subtracted from a token's logit if it is in the text"] = 0.0
    no_repeat_ngram_size: Annotated[NotNegative, "no n tokens in a row occur twice in prompt and text; 0 = off"] = 0
    logit_bias: Annotated[tuple[tuple[int, float], ...], "add a number to a token's logit; can be repeated"] = ()
    banned_ids: Annotated[tuple[int, ...], "tokens that are never chosen"] = ()
    min_new_tokens: Annotated[NotNegative, "do not end before this many tokens"] = 0
    ignore_eos: Annotated[bool, "continue after the end of a text"] = False
    stop: Annotated[tuple[str, ...], "end before this text; can be repeated"] = ()
    stop_ids: Annotated[tuple[int, ...], "end before these tokens"] = ()
    when_full: Annotated[
        Literal["slide", "stop"], "when the context is full, forget its older half (slide), or end the text (stop)"
    ] = "slide"
    seed: Annotated[int, Within("[0, 4294967295]"), "the same seed gives the same text"] = 0

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        super().__post_init__()
        most = max([abs(bias) for _, bias in self.logit_bias], default=0)
        require(
            (all(self.stop), 'stop="" would end every text at once: leave it out'),
            (most <= 1e9, f"logit_bias={shown(most)} must be from -1e9 to 1e9: use banned_ids to forbid a token"),
        )

    def check_ids(self, vocab_size: int) -> None:
        """Raise ParamsError where an option names an id that the model does not have."""
        biased = [i for i, _ in self.logit_bias]
        named = {"logit_bias": biased, "banned_ids": self.banned_ids, "stop_ids": self.stop_ids}
        wrong = [(name, i) for name, ids in named.items() for i in ids if not 0 <= i < vocab_size]
        require(*((False, f"{name} has {i}, but the model's ids are 0 to {vocab_size - 1}") for name, i in wrong))


@dataclass(frozen=True, kw_only=True)
class Search(Checked):
    """How many texts to follow at once, and which of them to take."""

    n_beam: Annotated[
        int, Within("[1, 256]"), "beam search: follow this many of the likeliest texts, at temperature 0; 1 = off"
    ] = 1
    length_penalty: Annotated[
        float, Within("[-10, 10]"), "for beam search: above 0 favours long texts, below 0 short ones"
    ] = 1.0  # a beam's log-probability is divided by (its number of tokens) ** length_penalty
    early_stopping: Annotated[
        Literal["false", "true", "never"], "end beam search with n_beam texts (true), or only when sure (never)"
    ] = "false"
    best_of: Annotated[int, Within("[1, 256]"), "draw this many texts, keep the likeliest per token"] = 1

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        super().__post_init__()
        of_beams = changed(self, ("length_penalty", "early_stopping"))
        require(
            (self.n_beam > 1 or not of_beams, f"{with_verb(of_beams)} for beam search: it needs n_beam above 1"),
            (min(self.n_beam, self.best_of) == 1, f"n_beam={self.n_beam} and best_of={self.best_of}: set one to 1"),
        )

    @property
    def n_row(self) -> int:
        """How many texts it follows at once."""
        return max(self.n_beam, self.best_of)

    def check(self, sampling: Sampling) -> None:
        """Raise ParamsError where the two contradict each other."""
        n_beam, best_of, temperature = self.n_beam, self.best_of, sampling.temperature
        drawn = changed(sampling, ("top_k", "top_p", "min_p", "typical_p"))
        require(
            (n_beam == 1 or temperature == 0, f"n_beam={n_beam} does not sample: it needs temperature=0"),
            (n_beam == 1 or not drawn, f"{with_verb(drawn)} for sampling: turn it off for beam search"),
            (best_of == 1 or temperature > 0, f"best_of={best_of} needs temperature above 0: at 0 all are the same"),
        )


@dataclass(frozen=True, kw_only=True)
class Proposals(Checked):
    """How much speculative decoding proposes."""

    n_draft: Annotated[int, Within("[1, 64]"), "tokens to propose for each pass of the model"] = 5
    ngram: Annotated[int, Within("[1, 16]"), "for a look-up: match at most this many of the last tokens"] = 3


def with_verb(names: Iterable[str]) -> str:
    """The names with their verb: `top_k is`, `top_k and top_p are`."""
    return f"{' and '.join(names)} {'is' if len([*names]) == 1 else 'are'}"


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """What the server accepts; it refuses requests beyond that, which bounds the memory that clients can use."""

    max_tokens: Annotated[Count, "tokens of an answer, at most"] = 4096
    max_rows: Annotated[int, Within("[1, 1024]"), "answers written at a time"] = 32  # each has a KV cache
    max_waiting: Annotated[Count, "requests that may wait; one more is refused with status 429"] = 128
    max_body: Annotated[Count, "bytes of a request"] = 2**18  # a larger one gets status 413
    max_prompt: Count = 2**14  # UTF-8 bytes, or ids, of one prompt
    max_prompts: Count = 2**15  # the same for all prompts of a request, each counted once per answer
    client_seconds: Count = 30  # for a client to send a head, then a body, and to read each PIECE of an answer

    @property
    def max_requests(self) -> int:
        """Requests of all kinds, twice as many as can run or wait: others read a page.  One more gets status 503."""
        return 2 * (self.max_rows + self.max_waiting)


@dataclass(frozen=True, kw_only=True)
class Settings(Search, Sampling, Length):
    """All options of a text."""

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        super().__post_init__()
        least, most = self.min_new_tokens, self.max_new_tokens
        together(
            lambda: self.check(self),
            lambda: require((least <= most, f"min_new_tokens={least} is more than max_new_tokens={most}")),
        )


DRAWN = {"temperature": 0.8, "top_p": 0.95}  # defaults of Settings where tokens are drawn


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from some values by name, and defaults for the rest.  Raises ParamsError with all that is wrong."""
    defaults = DRAWN if given.get("n_beam", 1) == 1 else {"temperature": 0.0}
    return Settings(**{**defaults, **given})


def together(*checks: Callable[[], Any]) -> list[Any]:
    """What several checks return.  Raises one ParamsError with all that they find."""
    found: list[Any] = []
    problems: list[str] = []
    for check in checks:
        try:
            found.append(check())
        except ParamsError as error:
            problems += error.problems
    if problems:
        raise ParamsError(problems)
    return found


def checked(prompt: str) -> str:
    """Return the prompt.  Raises UserError when it is too long, or has half a character, which UTF-8 cannot hold."""
    try:
        if len(prompt.encode()) > MOST_BYTES:
            raise UserError(f"prompt has more than {human_bytes(MOST_BYTES)}: shorten it")
    except UnicodeEncodeError as error:
        raise UserError(f"prompt is not UTF-8 from character {error.start} on: give it as UTF-8") from None
    return prompt


def seed_after(seed: int, n: int) -> int:
    """The n-th seed after this one, of 32 bits."""
    return (seed + n) % 2**32


@dataclass(frozen=True)
class Option:
    """A field of a dataclass, as its type describes it."""

    name: str
    type: Any  # without None
    default: Any
    help: str | None  # None = users cannot set it
    choices: tuple[Any, ...]  # of a Literal; empty for other types
    is_list: bool  # it takes several values


def options_of(cls: type) -> tuple[Option, ...]:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_option(field.name, hints[field.name], field.default) for field in fields(cls))


def changed(options: Any, names: Iterable[str]) -> dict[str, Any]:
    """The options among these names that are not at their default, which a dataclass keeps in its class."""
    return {name: value for name in names if (value := getattr(options, name)) != getattr(type(options), name)}


@functools.cache  # it takes a millisecond
def setting_options() -> dict[str, Option]:
    """All options of Settings by name."""
    return {option.name: option for option in options_of(Settings)}


def _option(name: str, hint: Any, default: Any) -> Option:
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (each for each in typing.get_args(kind) if each is not type(None))
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    help = next((mark for mark in marks if isinstance(mark, str)), None)
    return Option(name, kind, default, help, choices if origin is Literal else (), origin is tuple)
