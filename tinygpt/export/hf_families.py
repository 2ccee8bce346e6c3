"""The classes of transformers that our models can be (https://github.com/huggingface/transformers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinygpt.export.family import ALL, ANY_HEAD_DIM, FULL, MIXED, NORM_MODULES, QKV, Family, Layout, Target, switches
from tinygpt.model.config import ModelParams

BIASED = (*NORM_MODULES, *QKV, "o_proj", "up_proj", "down_proj")  # by model.bias=all, where an MLP has no gate
GELU, SILU, RELU2 = {"gelu": "gelu_pytorch_tanh"}, {"swiglu": "silu"}, {"relu2": "relu2"}

GPT2_NAMES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "blocks.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blocks.{i}.attn.q_proj": "transformer.h.{i}.attn.c_attn",
    "blocks.{i}.attn.o_proj": "transformer.h.{i}.attn.c_proj",
    "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    "blocks.{i}.mlp.up_proj": "transformer.h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down_proj": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def llama_names(**leaves: str) -> Mapping[str, str]:
    """The names of Llama's classes; `leaves` has those that a class calls otherwise: o_proj="dense"."""
    parts = {
        "self_attn": ("attn", ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        "mlp": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }
    return {
        "tok_emb": "model.embed_tokens",
        "blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "norm": f"model.{leaves.get('norm', 'norm')}",
        "lm_head": "lm_head",
    } | {
        f"blocks.{{i}}.{ours}.{leaf}": f"model.layers.{{i}}.{theirs}.{leaves.get(leaf, leaf)}"
        for theirs, (ours, found) in parts.items()
        for leaf in found
    }


GPT2_SIZES = {
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_hidden": "n_inner",
    "block_size": "n_positions",
}
ROPE_SIZES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",  # some classes assume 128
    "n_hidden": "intermediate_size",
    "block_size": "max_position_embeddings",
}
ROPE_FIXED = {"rope_scaling": None, "partial_rotary_factor": 1.0, "rope_type": "default"}


@dataclass(frozen=True, kw_only=True)
class HFFamily(Family):
    """A class of transformers, and what is where in its config.json."""

    cls: str
    activations: Mapping[str, str]  # kind of MLP -> what config.json calls its activation
    activation_key: str = "hidden_act"  # under which it does
    sizes: Mapping[str, str] = field(default_factory=lambda: ROPE_SIZES)  # our field -> their key
    eps: str  # their key of norm_eps
    config: Callable[[ModelParams, int, str], dict[str, Any]]  # more entries: of a model, its context, its activation
    fixed: Mapping[str, Any] = field(default_factory=lambda: ROPE_FIXED)  # what all models of ours have
    silent: Mapping[str, Any] = field(default_factory=dict)  # what the class takes where config.json is silent

    def document(self, config: ModelParams, n_ctx: int) -> dict[str, Any]:
        """What config.json says of a model with a context of `n_ctx` tokens, without what it says in all classes."""
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.sizes.items()}
        return sizes | {self.sizes["block_size"]: n_ctx} | self.config(config, n_ctx, self.activations[config.mlp])


def _gpt2_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    return {
        "n_ctx": n_ctx,  # gone from GPT2Config, still read by llama.cpp's converter
        "activation_function": activation,
        "scale_attn_weights": True,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _rope_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    return {
        # transformers 5 reads the first, 4 the others; some classes would rotate a part of each head only
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": 1.0,
        },
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
        "hidden_act": activation,
        "attention_dropout": 0.0,
        "attention_bias": config.bias != "none",
        "mlp_bias": config.bias == "all",
    }


def _window_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    kinds = {True: "full_attention", False: "sliding_attention"}
    return _rope_config(config, n_ctx, activation) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": [kinds[config.window_of(layer) is None] for layer in range(config.n_layer)],
    }


def _starcoder2_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    window = config.window if config.window and n_ctx > config.window else None
    return _rope_config(config, n_ctx, activation) | {
        "use_bias": config.bias != "none",
        "sliding_window": window,
        "embedding_dropout": config.dropout,
        "residual_dropout": config.dropout,
    }


def _phi_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    return _rope_config(config, n_ctx, activation) | {
        "qk_layernorm": config.qk_norm,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def _stablelm_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    return _rope_config(config, n_ctx, activation) | {
        "use_qkv_bias": config.bias != "none",
        "qk_layernorm": config.qk_norm,
        "use_parallel_residual": config.parallel_block,
        "hidden_dropout": config.dropout,
    }


def _cohere2_config(config: ModelParams, n_ctx: int, activation: str) -> dict[str, Any]:
    return _window_config(config, n_ctx, activation) | {"logit_scale": 1.0}


LLAMA_LAYOUT = Layout(names=llama_names(), zero_bias={"qkv": ("o_proj",)})  # attention has all biases or none

HF_FAMILIES = (
    HFFamily(
        name="gpt2",
        cls="GPT2LMHeadModel",
        activations=GELU,
        eps="layer_norm_epsilon",
        config=_gpt2_config,
        sizes=GPT2_SIZES,
        activation_key="activation_function",
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        silent={"tie_word_embeddings": True},
        switches=switches("learned", "layernorm", *GELU),
        layout=Layout(
            names=GPT2_NAMES,
            zero_bias={"none": BIASED, "qkv": BIASED},
            fused_qkv=True,
            repeated_kv=True,
            transposed=("q_proj", "o_proj", "up_proj", "down_proj"),
        ),
    ),
    HFFamily(
        name="starcoder2",
        cls="Starcoder2ForCausalLM",
        activations=GELU,
        eps="norm_epsilon",
        config=_starcoder2_config,
        silent={"tie_word_embeddings": True},
        switches=switches("rope", "layernorm", *GELU, window=(FULL, ALL)),
        layout=Layout(
            names=llama_names(up_proj="c_fc", down_proj="c_proj"),
            zero_bias={"none": NORM_MODULES, "qkv": BIASED},
        ),
    ),
    HFFamily(
        name="phi",
        cls="PhiForCausalLM",
        activations=GELU,
        eps="layer_norm_eps",
        config=_phi_config,
        switches=switches("rope", "layernorm", *GELU, parallel_block=(True,), qk_norm=(False, True)),
        layout=Layout(
            names=llama_names(
                o_proj="dense",
                up_proj="fc1",
                down_proj="fc2",
                q_norm="q_layernorm",
                k_norm="k_layernorm",
                norm="final_layernorm",
            ),
            zero_bias=dict.fromkeys(("none", "qkv", "all"), (*BIASED, "q_norm", "k_norm", "lm_head")),
            untied=True,
        ),
    ),
    HFFamily(
        name="stablelm",
        cls="StableLmForCausalLM",
        activations=SILU,
        eps="layer_norm_eps",
        config=_stablelm_config,
        switches=switches(
            "rope", "layernorm", *SILU, parallel_block=(False, True), qk_norm=(False, True), bias=("none", "qkv")
        ),
        layout=Layout(
            names=llama_names(q_norm="q_layernorm", k_norm="k_layernorm"),
            zero_bias={"none": NORM_MODULES, "qkv": NORM_MODULES},
            head_norms="listed",
        ),
    ),
    HFFamily(
        name="cohere2",  # rotates where a window is, so it must be in all layers
        cls="Cohere2ForCausalLM",
        activations=SILU,
        eps="layer_norm_eps",
        config=_cohere2_config,
        fixed=ROPE_FIXED | {"logit_scale": 1.0},
        silent={"logit_scale": 0.0625, "tie_word_embeddings": True},
        switches=switches(
            "rope",
            "layernorm",
            *SILU,
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
        activations=SILU,
        eps="rms_norm_eps",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", *SILU, head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="mistral",
        cls="MistralForCausalLM",
        activations=SILU,
        eps="rms_norm_eps",
        config=_window_config,
        switches=switches("rope", "rmsnorm", *SILU, head_dim=ANY_HEAD_DIM, bias=("none",), window=(ALL,)),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="qwen3",
        cls="Qwen3ForCausalLM",
        activations=SILU,
        eps="rms_norm_eps",
        config=_window_config,
        switches=switches(
            "rope",
            "rmsnorm",
            *SILU,
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
        activations=GELU | RELU2,
        eps="rms_norm_eps",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", *(GELU | RELU2), head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
)
TRANSFORMERS = Target("transformers", HF_FAMILIES, "export.hf=false")
