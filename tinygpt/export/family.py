"""Which models other programs can run: a family is a kind of model that one of them knows.

Its switches say which models belong to it, its layout how the program wants their tensors. What no family covers is
refused before training, with the smallest change that would work. A model whose tokens see only a window goes to a
family that honours it; where there is none, it goes to one that sees everything, with a context as short as the window:
there the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from tinygpt.errors import UserError
from tinygpt.export.layout import Layout
from tinygpt.model.config import GPTConfig, ModelParams
from tinygpt.params import ParamsError, yaml_text

N_ADVICE = 2  # changes that a refusal names
Bias = Literal["none", "qkv", "all"]
ANY_BIAS: tuple[Bias, ...] = ("none", "qkv", "all")  # from fewest to most
ANY_HEAD_DIM = ("null", "own")  # head_dim = n_embd / n_head, or another
FULL, ALL, MIXED = "null", "in all layers", "in some layers"  # of window


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that a program knows.  `switches` maps those of `switches_of` to the values that are allowed."""

    name: str  # what the program calls it
    switches: Mapping[str, tuple[Any, ...]]
    layout: Layout


AnyFamily = TypeVar("AnyFamily", bound=Family)


class Target(NamedTuple):
    """A program to export for, and how its export is turned off."""

    name: str
    families: Sequence[Family]
    off: str


def switches(position: str, norm: str, mlp: str, **others: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The switches of a family; those that are not named are as plain as can be."""
    plain = {
        "position": (position,),
        "norm": (norm,),
        "mlp": (mlp,),
        "parallel_block": (False,),
        "qk_norm": (False,),
        "bias": ANY_BIAS,
        "tie_weights": (False, True),
        "head_dim": ("null",),
        "window": (FULL,),
    }
    return plain | others


def switches_of(config: ModelParams) -> dict[str, Any]:
    """What decides the family of a model."""
    windows = {config.window_of(layer) for layer in range(config.n_layer)}
    return {
        "position": config.position,
        "norm": config.norm,
        "mlp": config.mlp,
        "parallel_block": config.parallel_block,
        "qk_norm": config.qk_norm,
        "bias": config.bias,
        "tie_weights": config.tie_weights,
        "head_dim": "null" if config.head_dim * config.n_head == config.n_embd else "own",
        "window": FULL if windows == {None} else MIXED if None in windows else ALL,
    }


def find_family(families: Sequence[AnyFamily], config: ModelParams) -> tuple[AnyFamily, int] | None:
    """The family that a model belongs to and the longest context that is exact there; None where there is none."""
    found = switches_of(config)
    for window, n_ctx in ((found["window"], config.block_size), (FULL, context_within(config))):
        for family in families:
            if not _misfit(found | {"window": window}, family.switches):
                return family, n_ctx
    return None


def context_within(config: ModelParams) -> int:
    """The longest context in which every token sees all before it."""
    return min(config.block_size, config.window or config.block_size)


def family_of(target: Target, config: ModelParams) -> tuple[Any, int]:
    """As find_family.  Raises ParamsError with the nearest changes that work."""
    if found := find_family(target.families, config):
        return found
    raise ParamsError([refusal([target], config)])


def refusal(targets: Sequence[Target], config: ModelParams) -> str:
    """Why a model cannot be exported to all of these, and the nearest changes after which it can."""
    found = switches_of(config) | {"window": FULL}
    alternatives: list[dict[str, tuple[Any, ...]]] = [{}]
    for target in targets:
        alternatives = [_common(a, family.switches) for a in alternatives for family in target.families]
        alternatives = [a for a in alternatives if all(a.values())]
    misfits = sorted((_misfit(found, a) for a in alternatives), key=len)
    smallest = [m for i, m in enumerate(misfits) if not any(known.keys() <= m.keys() for known in misfits[:i])]
    advice = [_settings(misfit) for misfit in smallest[:N_ADVICE]]
    lacking = [target for target in targets if find_family(target.families, config) is None]
    names = " and ".join(target.name for target in lacking)
    off = " and ".join(target.off for target in lacking)
    found["head_dim"] = config.head_dim if found["head_dim"] == "own" else found["head_dim"]
    plain = ", ".join(f"model.{key}={yaml_text(value)}" for key, value in found.items() if key != "window")
    return f"no model of {names} has {plain}: set {', or '.join(advice)}, or turn that export off with {off}"


def check_vocabulary(config: GPTConfig, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the one that the model was trained with.  Raises UserError."""
    if vocab_size != config.vocab_size:
        raise UserError(
            f"data/tokenizer has {vocab_size} tokens, data/model was trained with {config.vocab_size}: "
            "run `dvc repro train` to train it on this tokenizer"
        )


def _common(one: Mapping[str, tuple[Any, ...]], other: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The values that both allow, for all switches of `other`; windows do not count, as each has its way with them."""
    keys = [key for key in other if key != "window"]
    return {key: tuple(value for value in other[key] if value in one.get(key, other[key])) for key in keys}


def _misfit(found: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The switches in which a model differs from what is allowed, with that."""
    return {key: values for key, values in allowed.items() if found[key] not in values}


def _settings(changes: Mapping[str, tuple[Any, ...]]) -> str:
    return " and ".join(f"model.{key}={'|'.join(map(yaml_text, allowed))}" for key, allowed in changes.items())
