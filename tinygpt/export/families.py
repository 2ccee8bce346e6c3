"""Which models other programs can run: a family is a kind of model that a program knows. llama.cpp's are in this file.

A family's switches say which models belong to it, its layout how the program wants their tensors. A model that fits no
family is refused before training, with the smallest change that would work. A model whose tokens see only a window goes
to a family that has windows. If there is none, it goes to one whose tokens see everything, with a context as short as
the window: up to that length the two are the same.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from tinygpt.errors import shown
from tinygpt.model.config import ModelParams
from tinygpt.params import ParamsError

N_ADVICE = 2  # changes that a refusal suggests
CHOICES = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(ModelParams).items()}
ANY_BIAS: tuple[Any, ...] = CHOICES["bias"]  # from fewest to most biases
CORE: dict[str, tuple[Any, ...]] = {  # the switches that decide the computation, and their values
    name: CHOICES[name] or (False, True) for name in ("position", "norm", "mlp", "parallel_block", "qk_norm")
}
ANY_HEAD_DIM = (None, "own")  # head_dim = n_embd / n_head, or another
FULL, ALL, MIXED = "null", "in all layers", "in some layers"  # values of the switch `window`
QKV = ("q_proj", "k_proj", "v_proj")
NORM_MODULES = ("attn_norm", "mlp_norm", "norm")  # our modules that must have a bias in many programs


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a program wants the tensors, where that differs from tinygpt's own state dict."""

    names: Mapping[str, str]  # our module -> theirs, {i} is the block; only the modules that the models have
    biased: tuple[str, ...] = ()  # modules that always have a bias there: zeros if ours has none
    biased_if_any: tuple[str, ...] = ()  # modules that have a bias if any of ours has one
    untied: bool = False  # a tied head is written as a tensor of its own
    fused_qkv: bool = False  # q_proj, k_proj and v_proj are one matrix, rows in this order, named like q_proj
    adjacent_rope: bool = False  # rotation pairs are next to each other in a head, not half a head apart
    repeated_kv: bool = False  # no GQA: each key/value head is written once per query head that reads it
    transposed: tuple[str, ...] = ()  # modules whose weight is (in, out)
    head_norms: Literal["shared", "stacked", "listed"] = "shared"  # qk_norm: one for all, a row or a tensor per head
    sinks: bool = False  # has attention sinks, which are written so that they have no effect


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that a program knows.  `switches` maps the keys of `switches_of` to the values it allows."""

    name: str  # what the program calls it
    switches: Mapping[str, tuple[Any, ...]]
    layout: Layout


@dataclass
class Target:
    """A program to export for, and the param that turns its export off."""

    name: str
    families: Sequence[Any]
    off: str


def switches(position: str, norm: str, *mlps: str, **others: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The switches of a family with these kinds of MLP; those that are not given have plain values."""
    plain = {
        "position": (position,),
        "norm": (norm,),
        "mlp": mlps,
        "parallel_block": (False,),
        "qk_norm": (False,),
        "bias": ANY_BIAS,
        "tie_weights": (False, True),
        "head_dim": (None,),
        "window": (FULL,),
    }
    return plain | others


# Families of both programs. Cohere's rotates only in layers with a window, so all layers must have one.
STABLELM = switches(
    "rope", "layernorm", "swiglu", parallel_block=(False, True), qk_norm=(False, True), bias=("none", "qkv")
)
COHERE2 = STABLELM | {"parallel_block": (True,), "qk_norm": (False,), "tie_weights": (True,), "window": (ALL,)}
QWEN3 = switches("rope", "rmsnorm", "swiglu", qk_norm=(True,), bias=("none", "qkv"), head_dim=ANY_HEAD_DIM)


def switches_of(config: ModelParams) -> dict[str, Any]:
    """The values that decide the family of a model."""
    return {name: getattr(config, name) for name in (*CORE, "bias", "tie_weights")} | {
        "head_dim": None if config.head_dim * config.n_head == config.n_embd else "own",
        "window": FULL if config.windows == {None} else MIXED if None in config.windows else ALL,
    }


def find_family(families: Sequence[Family], config: ModelParams) -> tuple[Family, int] | None:
    """The family of a model, and the longest context that is exact there; None if no family fits."""
    found = switches_of(config)
    in_window = min(config.block_size, config.window or config.block_size)  # up to here a token sees all before it
    for window, n_ctx in ((found["window"], config.block_size), (FULL, in_window)):
        for family in families:
            if not misfit(found | {"window": window}, family.switches):
                return family, n_ctx
    return None


def family_of(target: Target, config: ModelParams) -> tuple[Any, int]:
    """Like find_family.  Raises ParamsError with the nearest changes that would work."""
    if found := find_family(target.families, config):
        return found
    raise ParamsError([refusal([target], config)])


def refusal(targets: Sequence[Target], config: ModelParams) -> str:
    """Why a model cannot be exported to all of these, and the nearest changes that would make it possible."""
    found = switches_of(config) | {"window": FULL}
    alternatives = [_common(*families) for families in product(*(target.families for target in targets))]
    misfits = sorted((misfit(found, a) for a in alternatives if all(a.values())), key=len)
    smallest = [m for i, m in enumerate(misfits) if not any(known.keys() <= m.keys() for known in misfits[:i])]
    advice = [_settings(misfit) for misfit in smallest[:N_ADVICE]]
    lacking = [target for target in targets if find_family(target.families, config) is None]
    names = " and ".join(target.name for target in lacking)
    off = " and ".join(target.off for target in lacking)
    found["head_dim"] = config.head_dim if found["head_dim"] == "own" else found["head_dim"]
    plain = ", ".join(f"model.{key}={shown(value)}" for key, value in found.items() if key != "window")
    have = "has" if len(lacking) == 1 else "have"
    return f"{names} {have} no model with {plain}: set {', or '.join(advice)}, or turn that export off with {off}"


def _common(*families: Family) -> dict[str, tuple[Any, ...]]:
    """For each switch, the values that all allow; not for windows, which each handles in its own way."""
    allowed = {key: values for key, values in families[-1].switches.items() if key != "window"}
    return {
        key: tuple(value for value in values if all(value in family.switches[key] for family in families))
        for key, values in allowed.items()
    }


def misfit(found: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The switches whose value in a model is not allowed, with the values that are."""
    return {key: values for key, values in allowed.items() if key in found and found[key] not in values}


def _settings(changes: Mapping[str, tuple[Any, ...]]) -> str:
    return " and ".join(f"model.{key}={'|'.join(map(shown, allowed))}" for key, allowed in changes.items())


# The architectures of llama.cpp (https://github.com/ggml-org/llama.cpp, src/models/)
GGUF_NAMES = {
    "tok_emb": "token_embd",
    "pos_emb": "position_embd",
    "blocks.{i}.attn_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attn.q_proj": "blk.{i}.attn_q",
    "blocks.{i}.attn.k_proj": "blk.{i}.attn_k",
    "blocks.{i}.attn.v_proj": "blk.{i}.attn_v",
    "blocks.{i}.attn.o_proj": "blk.{i}.attn_output",
    "blocks.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attn.sinks": "blk.{i}.attn_sinks",
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "blocks.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "blocks.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
FUSED_GGUF_NAMES = GGUF_NAMES | {"blocks.{i}.attn.q_proj": "blk.{i}.attn_qkv"}

BIASED = (*NORM_MODULES, "o_proj", "up_proj", "down_proj")  # by model.bias=all but not by qkv, in an MLP without a gate


PLAIN_LAYOUT, LLAMA_LAYOUT = Layout(names=GGUF_NAMES), Layout(names=GGUF_NAMES, adjacent_rope=True)

GGUF_FAMILIES = (
    Family(
        name="gpt2",
        switches=switches("learned", "layernorm", "gelu"),
        layout=Layout(names=FUSED_GGUF_NAMES, biased=(*BIASED, *QKV), fused_qkv=True),
    ),
    Family(
        name="starcoder2",
        switches=switches("rope", "layernorm", "gelu"),
        layout=Layout(names=GGUF_NAMES, biased=BIASED),
    ),
    Family(
        name="phi2",
        switches=switches("rope", "layernorm", "gelu", parallel_block=(True,)),
        layout=Layout(names=GGUF_NAMES, biased=(*BIASED, "lm_head"), untied=True),
    ),
    Family(
        name="stablelm",
        switches=STABLELM,
        layout=Layout(names=GGUF_NAMES, biased=NORM_MODULES, untied=True, head_norms="stacked"),
    ),
    Family(name="cohere2", switches=COHERE2, layout=LLAMA_LAYOUT),
    Family(name="llama", switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM), layout=LLAMA_LAYOUT),
    Family(
        name="granite_swa",
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM, window=(ALL, MIXED)),
        layout=Layout(names=GGUF_NAMES, adjacent_rope=True, sinks=True),
    ),
    Family(name="qwen3", switches=QWEN3, layout=PLAIN_LAYOUT),
    Family(
        name="plamo",
        switches=switches("rope", "rmsnorm", "swiglu", parallel_block=(True,), bias=("none", "qkv")),
        layout=Layout(names=GGUF_NAMES, untied=True),
    ),
    Family(
        name="arcee",
        switches=switches("rope", "rmsnorm", "relu2", bias=("none", "qkv"), head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
)
LLAMA_CPP = Target("llama.cpp", GGUF_FAMILIES, "export.gguf=[]")
