"""The classes of transformers that our models can be (https://github.com/huggingface/transformers)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinygpt.export.family import ALL, ANY_HEAD_DIM, FULL, MIXED, Family, Target, switches
from tinygpt.export.layout import Layout
from tinygpt.export.names import GPT2_NAMES, NORMS, llama_names
from tinygpt.model.config import ModelParams

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "swiglu": "silu", "relu2": "relu2"}


@dataclass(frozen=True, kw_only=True)
class HFFamily(Family):
    """`config` makes the entries of config.json that are not alike in all classes, from the model and its context.

    The norm's epsilon goes under `eps` there.
    """

    cls: str
    eps: str
    config: Callable[[ModelParams, int], dict[str, Any]]


def _gpt2_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return {
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_hidden,
        "n_positions": n_ctx,
        "n_ctx": n_ctx,  # gone from GPT2Config, still read by llama.cpp's converter
        "activation_function": ACTIVATIONS[config.mlp],
        "scale_attn_weights": True,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _rope_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return {
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,  # some classes assume 128
        "intermediate_size": config.n_hidden,
        "max_position_embeddings": n_ctx,
        # transformers 5 reads the first, 4 the others; some classes would rotate a part of each head only
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": 1.0,
        },
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
        "hidden_act": ACTIVATIONS[config.mlp],
        "attention_dropout": 0.0,
        "attention_bias": config.bias != "none",
        "mlp_bias": config.bias == "all",
    }


def _window_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    kinds = {True: "full_attention", False: "sliding_attention"}
    return _rope_config(config, n_ctx) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": [kinds[config.window_of(layer) is None] for layer in range(config.n_layer)],
    }


def _starcoder2_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    window = config.window if config.window and n_ctx > config.window else None
    return _rope_config(config, n_ctx) | {
        "use_bias": config.bias != "none",
        "sliding_window": window,
        "embedding_dropout": config.dropout,
        "residual_dropout": config.dropout,
    }


def _phi_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return _rope_config(config, n_ctx) | {
        "qk_layernorm": config.qk_norm,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def _stablelm_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return _rope_config(config, n_ctx) | {
        "use_qkv_bias": config.bias != "none",
        "qk_layernorm": config.qk_norm,
        "use_parallel_residual": config.parallel_block,
        "hidden_dropout": config.dropout,
    }


def _cohere2_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return _window_config(config, n_ctx) | {"logit_scale": 1.0}


LLAMA_LAYOUT = Layout(names=llama_names(), zero_bias={"qkv": ("o_proj",)})  # attention has all biases or none

HF_FAMILIES = (
    HFFamily(
        name="gpt2",
        cls="GPT2LMHeadModel",
        eps="layer_norm_epsilon",
        config=_gpt2_config,
        switches=switches("learned", "layernorm", "gelu"),
        layout=Layout(
            names=GPT2_NAMES,
            zero_bias={"none": (*NORMS, *LINEAR), "qkv": (*NORMS, *LINEAR)},
            fused_qkv=True,
            repeated_kv=True,
            transposed=("q_proj", "o_proj", "up_proj", "down_proj"),
        ),
    ),
    HFFamily(
        name="starcoder2",
        cls="Starcoder2ForCausalLM",
        eps="norm_epsilon",
        config=_starcoder2_config,
        switches=switches("rope", "layernorm", "gelu", window=(FULL, ALL)),
        layout=Layout(
            names=llama_names(up_proj="c_fc", down_proj="c_proj"),
            zero_bias={"none": NORMS, "qkv": (*NORMS, *LINEAR)},
        ),
    ),
    HFFamily(
        name="phi",
        cls="PhiForCausalLM",
        eps="layer_norm_eps",
        config=_phi_config,
        switches=switches("rope", "layernorm", "gelu", parallel_block=(True,), qk_norm=(False, True)),
        layout=Layout(
            names=llama_names(
                o_proj="dense",
                up_proj="fc1",
                down_proj="fc2",
                q_norm="q_layernorm",
                k_norm="k_layernorm",
                norm="final_layernorm",
            ),
            zero_bias=dict.fromkeys(("none", "qkv", "all"), (*NORMS, *LINEAR, "q_norm", "k_norm", "lm_head")),
            untied=True,
        ),
    ),
    HFFamily(
        name="stablelm",
        cls="StableLmForCausalLM",
        eps="layer_norm_eps",
        config=_stablelm_config,
        switches=switches(
            "rope", "layernorm", "swiglu", parallel_block=(False, True), qk_norm=(False, True), bias=("none", "qkv")
        ),
        layout=Layout(
            names=llama_names(q_norm="q_layernorm", k_norm="k_layernorm"),
            zero_bias={"none": NORMS, "qkv": NORMS},
            head_norms="listed",
        ),
    ),
    HFFamily(
        name="cohere2",  # rotates where a window is, so it must be in all layers
        cls="Cohere2ForCausalLM",
        eps="layer_norm_eps",
        config=_cohere2_config,
        switches=switches(
            "rope",
            "layernorm",
            "swiglu",
            parallel_block=(True,),
            bias=("none", "qkv"),
            tie_weights=(True,),
            window=(ALL,),
        ),
        layout=Layout(names=llama_names(), zero_bias={"qkv": ("o_proj",)}, adjacent_rope=True),
    ),
    HFFamily(
        name="llama",
        cls="LlamaForCausalLM",
        eps="rms_norm_eps",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="mistral",
        cls="MistralForCausalLM",
        eps="rms_norm_eps",
        config=_window_config,
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM, bias=("none",), window=(ALL,)),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="qwen3",
        cls="Qwen3ForCausalLM",
        eps="rms_norm_eps",
        config=_window_config,
        switches=switches(
            "rope",
            "rmsnorm",
            "swiglu",
            qk_norm=(True,),
            bias=("none", "qkv"),
            head_dim=ANY_HEAD_DIM,
            window=(FULL, ALL, MIXED),
        ),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="arcee",
        cls="ArceeForCausalLM",
        eps="rms_norm_eps",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", "relu2", head_dim=ANY_HEAD_DIM) | {"mlp": ("gelu", "relu2")},
        layout=LLAMA_LAYOUT,
    ),
)
TRANSFORMERS = Target("transformers", HF_FAMILIES, "export.hf=false")
