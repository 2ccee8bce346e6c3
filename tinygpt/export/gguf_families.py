"""The architectures of llama.cpp that our models can be (https://github.com/ggml-org/llama.cpp, src/models/)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.export.family import ALL, ANY_HEAD_DIM, MIXED, Family, Target, switches
from tinygpt.export.layout import QKV, Layout
from tinygpt.export.names import FUSED_GGUF_NAMES, GGUF_NAMES, NORMS
from tinygpt.model.config import ModelParams

OUTPUTS = ("o_proj", "up_proj", "down_proj")


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


LLAMA_LAYOUT = Layout(names=GGUF_NAMES, zero_bias={}, adjacent_rope=True)

GGUF_FAMILIES = (
    GGUFFamily(
        name="gpt2",
        switches=switches("learned", "layernorm", "gelu"),
        layout=Layout(
            names=FUSED_GGUF_NAMES,
            zero_bias={"none": (*NORMS, *QKV, *OUTPUTS), "qkv": (*NORMS, *OUTPUTS)},
            fused_qkv=True,
        ),
    ),
    GGUFFamily(
        name="starcoder2",
        switches=switches("rope", "layernorm", "gelu"),
        layout=Layout(names=GGUF_NAMES, zero_bias={"none": (*NORMS, *OUTPUTS), "qkv": (*NORMS, *OUTPUTS)}),
    ),
    GGUFFamily(
        name="phi2",
        switches=switches("rope", "layernorm", "gelu", parallel_block=(True,)),
        layout=Layout(
            names=GGUF_NAMES,
            zero_bias={
                "none": (*NORMS, *OUTPUTS, "lm_head"),
                "qkv": (*NORMS, *OUTPUTS, "lm_head"),
                "all": ("lm_head",),
            },
            untied=True,
        ),
    ),
    GGUFFamily(
        name="stablelm",
        switches=switches(
            "rope", "layernorm", "swiglu", parallel_block=(False, True), qk_norm=(False, True), bias=("none", "qkv")
        ),
        layout=Layout(names=GGUF_NAMES, zero_bias={"none": NORMS, "qkv": NORMS}, untied=True, head_norms="stacked"),
    ),
    GGUFFamily(
        name="cohere2",  # rotates where a window is, so it must be in all layers
        switches=switches(
            "rope",
            "layernorm",
            "swiglu",
            parallel_block=(True,),
            bias=("none", "qkv"),
            tie_weights=(True,),
            window=(ALL,),
        ),
        layout=LLAMA_LAYOUT,
        keys=_window_keys,
    ),
    GGUFFamily(
        name="llama",
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
    GGUFFamily(
        name="granite_swa",
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM, window=(ALL, MIXED)),
        layout=Layout(names=GGUF_NAMES, zero_bias={}, adjacent_rope=True, sinks=True),
        keys=_window_keys,
    ),
    GGUFFamily(
        name="qwen3",
        switches=switches("rope", "rmsnorm", "swiglu", qk_norm=(True,), bias=("none", "qkv"), head_dim=ANY_HEAD_DIM),
        layout=Layout(names=GGUF_NAMES, zero_bias={}),
    ),
    GGUFFamily(
        name="plamo",
        switches=switches("rope", "rmsnorm", "swiglu", parallel_block=(True,), bias=("none", "qkv")),
        layout=Layout(names=GGUF_NAMES, zero_bias={}, untied=True),
    ),
    GGUFFamily(
        name="arcee",
        switches=switches("rope", "rmsnorm", "relu2", bias=("none", "qkv"), head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
)
LLAMA_CPP = Target("llama.cpp", GGUF_FAMILIES, "export.gguf=[]")
