"""Which models other programs can run: a table of families, each with its layout in GGUF and in transformers.

A family is one entry of FAMILIES. Its switches say which models belong to it; its two layouts say how llama.cpp
(https://github.com/ggml-org/llama.cpp, src/models/<architecture>.cpp) and transformers (modeling_<model_type>.py)
want its tensors. What no family covers is refused before training, with the smallest change that would work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.errors import UserError
from tinygpt.export.config import ExportParams
from tinygpt.export.names import GGUF_NAMES, GPT2_NAMES, LLAMA_NAMES
from tinygpt.model.config import GPTConfig, ModelParams
from tinygpt.params import ParamsError, require

MIN_BLOCK_SIZE = 4  # half a context and one token more are read before the first that counts for perplexity
N_ADVICE = 2  # families that a refusal names
ALL_BIASED = ("attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "up_proj", "down_proj", "norm")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one program wants the tensors: what differs from tinygpt's own state dict."""

    names: Mapping[str, str]  # our module to theirs, {i} stands for the block
    zero_bias: Mapping[
        str, tuple[str, ...]
    ]  # model.bias to the modules that have a bias there: zeros where we have none
    fused_qkv: bool = False  # q_proj, k_proj and v_proj are one matrix, rows in this order, named like q_proj
    adjacent_rope: bool = False  # rotation pairs stand side by side in a head, not half a head apart
    repeated_kv: bool = False  # knows no GQA: each key/value head is written once per query head that reads it
    transposed: tuple[str, ...] = ()  # modules whose weight is (in, out)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that llama.cpp and transformers know.

    `switches` maps a key of the model group to the values that the family allows. `hf_config` makes the entries of
    config.json that are not alike in all families; the norm's epsilon goes under `hf_eps` there.
    """

    name: str
    switches: Mapping[str, tuple[Any, ...]]
    gguf_arch: str
    gguf: Layout
    hf_class: str
    hf_type: str
    hf_eps: str
    hf_config: Callable[[ModelParams], dict[str, Any]]
    hf: Layout


def _gpt2_config(config: ModelParams) -> dict[str, Any]:
    return {
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_hidden,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # gone from GPT2Config, still read by llama.cpp's converter
        "activation_function": "gelu_pytorch_tanh",
        "scale_attn_weights": True,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _rope_config(config: ModelParams) -> dict[str, Any]:
    return {
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,  # some classes assume 128
        "intermediate_size": config.n_hidden,
        "max_position_embeddings": config.block_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # transformers 4
        "hidden_act": "silu",
        "attention_bias": config.bias != "none",
        "attention_dropout": 0.0,
    }


def _llama_config(config: ModelParams) -> dict[str, Any]:
    return _rope_config(config) | {"mlp_bias": config.bias == "all"}


FAMILIES = (
    Family(
        name="gpt2",
        switches={
            "position": ("learned",),
            "norm": ("layernorm",),
            "mlp": ("gelu",),
            "bias": ("none", "qkv", "all"),
            "qk_norm": (False,),
        },
        gguf_arch="gpt2",
        gguf=Layout(
            names=GGUF_NAMES | {"blocks.{i}.attn.q_proj": "blk.{i}.attn_qkv"},
            zero_bias={"none": ALL_BIASED, "qkv": ALL_BIASED},
            fused_qkv=True,
        ),
        hf_class="GPT2LMHeadModel",
        hf_type="gpt2",
        hf_eps="layer_norm_epsilon",
        hf_config=_gpt2_config,
        hf=Layout(
            names=GPT2_NAMES,
            zero_bias={"none": ALL_BIASED, "qkv": ALL_BIASED},
            fused_qkv=True,
            repeated_kv=True,
            transposed=("q_proj", "o_proj", "up_proj", "down_proj"),
        ),
    ),
    Family(
        name="llama",
        switches={
            "position": ("rope",),
            "norm": ("rmsnorm",),
            "mlp": ("swiglu",),
            "bias": ("none", "qkv", "all"),
            "qk_norm": (False,),
        },
        gguf_arch="llama",
        gguf=Layout(names=GGUF_NAMES, zero_bias={}, adjacent_rope=True),
        hf_class="LlamaForCausalLM",
        hf_type="llama",
        hf_eps="rms_norm_eps",
        hf_config=_llama_config,
        hf=Layout(names=LLAMA_NAMES, zero_bias={"qkv": ("o_proj",)}),
    ),
    Family(
        name="qwen3",
        switches={
            "position": ("rope",),
            "norm": ("rmsnorm",),
            "mlp": ("swiglu",),
            "bias": ("none", "qkv"),
            "qk_norm": (True,),
        },
        gguf_arch="qwen3",
        gguf=Layout(names=GGUF_NAMES, zero_bias={}),
        hf_class="Qwen3ForCausalLM",
        hf_type="qwen3",
        hf_eps="rms_norm_eps",
        hf_config=_rope_config,
        hf=Layout(names=LLAMA_NAMES, zero_bias={"qkv": ("o_proj",)}),
    ),
)


def family_of(config: ModelParams) -> Family:
    """The family that a model belongs to.  Raises ParamsError with the nearest changes where there is none."""
    for family in FAMILIES:
        if not _misfit(config, family):
            return family
    nearest = sorted(FAMILIES, key=lambda family: len(_misfit(config, family)))[:N_ADVICE]
    found = ", ".join(f"model.{key}={_yaml(getattr(config, key))}" for key in FAMILIES[0].switches)
    advice = ", or ".join(f"{_settings(_misfit(config, family))} ({family.name})" for family in nearest)
    raise ParamsError(
        [f"{found} cannot be exported: set {advice}, or turn the export off with export.hf=false and export.gguf=[]"]
    )


def check_export(config: ModelParams, export: ExportParams) -> None:
    """Refuse a model that cannot be exported as asked, before it is trained.  Raises ParamsError."""
    if export.hf or export.gguf:
        family_of(config)
    require(
        (
            not export.gguf or config.block_size >= MIN_BLOCK_SIZE,
            f"model.block_size={config.block_size} is too short to check export.gguf: at least {MIN_BLOCK_SIZE}",
        )
    )


def check_vocabulary(config: GPTConfig, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the one that the model was trained with.  Raises UserError."""
    if vocab_size != config.vocab_size:
        raise UserError(
            f"data/tokenizer has {vocab_size} tokens, data/model was trained with {config.vocab_size}: "
            "run `dvc repro train` to train it on this tokenizer"
        )


def family_table() -> str:
    """The families as a Markdown table, for the docs."""
    keys = list(FAMILIES[0].switches)
    rows = [[*(f"`{key}`" for key in keys), "llama.cpp architecture", "transformers class"], ["---"] * (len(keys) + 2)]
    for family in FAMILIES:
        values = [", ".join(map(_yaml, family.switches[key])) for key in keys]
        rows.append([*values, f"`{family.gguf_arch}`", f"`{family.hf_class}`"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _misfit(config: ModelParams, family: Family) -> dict[str, tuple[Any, ...]]:
    """The switches in which a model differs from a family, with what the family allows."""
    return {key: allowed for key, allowed in family.switches.items() if getattr(config, key) not in allowed}


def _settings(switches: Mapping[str, tuple[Any, ...]]) -> str:
    return " and ".join(f"model.{key}={'|'.join(map(_yaml, allowed))}" for key, allowed in switches.items())


def _yaml(value: Any) -> str:
    return str(value).lower()
