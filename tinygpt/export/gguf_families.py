"""The architectures of llama.cpp that our models can be (https://github.com/ggml-org/llama.cpp, src/models/)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.export.family import (
    ALL,
    ANY_HEAD_DIM,
    COHERE2,
    MIXED,
    NORM_MODULES,
    QKV,
    QWEN3,
    STABLELM,
    Family,
    Layout,
    Target,
    switches,
)
from tinygpt.model.config import ModelParams

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

BIASED = (*NORM_MODULES, "o_proj", "up_proj", "down_proj")  # by model.bias=all and not by qkv, without a gate


@dataclass(frozen=True, kw_only=True)
class GGUFFamily(Family):
    """`keys` makes the entries, without the architecture's name before them, that not all architectures have."""

    keys: Callable[[ModelParams], Mapping[str, Any]] = lambda config: {}


def _window_keys(config: ModelParams) -> dict[str, Any]:
    return {
        "logit_scale": 1.0,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": [config.window_of(i) is not None for i in range(config.n_layer)],
    }


PLAIN_LAYOUT, LLAMA_LAYOUT = Layout(names=GGUF_NAMES), Layout(names=GGUF_NAMES, adjacent_rope=True)

GGUF_FAMILIES = (
    GGUFFamily(
        name="gpt2",
        switches=switches("learned", "layernorm", "gelu"),
        layout=Layout(names=FUSED_GGUF_NAMES, zero_bias={"none": (*BIASED, *QKV), "qkv": BIASED}, fused_qkv=True),
    ),
    GGUFFamily(
        name="starcoder2",
        switches=switches("rope", "layernorm", "gelu"),
        layout=Layout(names=GGUF_NAMES, zero_bias={"none": BIASED, "qkv": BIASED}),
    ),
    GGUFFamily(
        name="phi2",
        switches=switches("rope", "layernorm", "gelu", parallel_block=(True,)),
        layout=Layout(
            names=GGUF_NAMES,
            zero_bias=dict.fromkeys(("none", "qkv"), (*BIASED, "lm_head")) | {"all": ("lm_head",)},
            untied=True,
        ),
    ),
    GGUFFamily(
        name="stablelm",
        switches=STABLELM,
        layout=Layout(
            names=GGUF_NAMES, zero_bias=dict.fromkeys(("none", "qkv"), NORM_MODULES), untied=True, head_norms="stacked"
        ),
    ),
    GGUFFamily(name="cohere2", switches=COHERE2, layout=LLAMA_LAYOUT, keys=_window_keys),
    GGUFFamily(
        name="llama", switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM), layout=LLAMA_LAYOUT
    ),
    GGUFFamily(
        name="granite_swa",
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM, window=(ALL, MIXED)),
        layout=Layout(names=GGUF_NAMES, adjacent_rope=True, sinks=True),
        keys=_window_keys,
    ),
    GGUFFamily(name="qwen3", switches=QWEN3, layout=PLAIN_LAYOUT),
    GGUFFamily(
        name="plamo",
        switches=switches("rope", "rmsnorm", "swiglu", parallel_block=(True,), bias=("none", "qkv")),
        layout=Layout(names=GGUF_NAMES, untied=True),
    ),
    GGUFFamily(
        name="arcee",
        switches=switches("rope", "rmsnorm", "relu2", bias=("none", "qkv"), head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
)
LLAMA_CPP = Target("llama.cpp", GGUF_FAMILIES, "export.gguf=[]")
