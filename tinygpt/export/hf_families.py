"""The classes of transformers that our models fit (https://github.com/huggingface/transformers)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tinygpt.export.families import (
    ALL,
    ANY_HEAD_DIM,
    COHERE2,
    FULL,
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

BIASED = (*NORM_MODULES, *QKV, "o_proj", "up_proj", "down_proj")  # by model.bias=all, in an MLP without a gate
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "swiglu": "silu", "relu2": "relu2"}  # kind of MLP -> its name there

HEAD_NORMS = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"}

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
    """The names in Llama's classes; `leaves` has those that differ in another class: o_proj="dense"."""
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


@dataclass(frozen=True, kw_only=True)
class HFFamily(Family):
    """A class of transformers, and the keys and values of its config.json."""

    cls: str
    activation_key: str = "hidden_act"  # their key for the activation
    sizes: Mapping[str, str] = field(default_factory=lambda: ROPE_SIZES)  # our field -> their key
    eps: str = "rms_norm_eps"  # their key for norm_eps
    config: Callable[[ModelParams, int], dict[str, Any]]  # (model, tokens of context) -> entries
    copied: Mapping[str, str] = field(default_factory=dict)  # more entries: their key -> our field
    fixed: Mapping[str, Any] = field(default_factory=dict)  # entries that all our models share
    silent: Mapping[str, Any] = field(default_factory=dict)  # the class's defaults for what config.json lacks
    read: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # switches of models that we write as another
    layer_types: Literal["ignored", "optional", "required"] = "ignored"  # the key for which layers have a window

    def document(self, config: ModelParams, n_ctx: int) -> dict[str, Any]:
        """The entries of config.json that depend on the class, for a model with a context of `n_ctx` tokens."""
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.sizes.items()}
        copied = {theirs: getattr(config, ours) for theirs, ours in self.copied.items()}
        return {**sizes, self.sizes["block_size"]: n_ctx, **self.config(config, n_ctx), **copied, **self.fixed}


def _gpt2_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    return {
        "n_ctx": n_ctx,  # removed from GPT2Config, but llama.cpp's converter still reads it
        "activation_function": ACTIVATIONS[config.mlp],
        "attn_pdrop": 0.0,
    }


def _rope_config(config: ModelParams, n_ctx: int) -> dict[str, Any]:
    # transformers 5 reads rope_parameters, 4 the others; by default, some classes rotate only a part of each head
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,
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
    return _rope_config(config, n_ctx) | {"use_bias": config.bias != "none", "sliding_window": window}


LLAMA_LAYOUT = Layout(names=llama_names(), biased_if_any=("o_proj",))  # attention has all biases or none

HF_FAMILIES = (
    HFFamily(
        name="gpt2",
        cls="GPT2LMHeadModel",
        eps="layer_norm_epsilon",
        config=_gpt2_config,
        copied={"embd_pdrop": "dropout", "resid_pdrop": "dropout"},
        sizes=GPT2_SIZES,
        activation_key="activation_function",
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        silent={"tie_word_embeddings": True},
        switches=switches("learned", "layernorm", "gelu"),
        layout=Layout(
            names=GPT2_NAMES,
            biased=BIASED,
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
        copied={"embedding_dropout": "dropout", "residual_dropout": "dropout"},
        silent={"tie_word_embeddings": True},
        switches=switches("rope", "layernorm", "gelu", window=(FULL, ALL)),
        layout=Layout(names=llama_names(up_proj="c_fc", down_proj="c_proj"), biased=NORM_MODULES, biased_if_any=BIASED),
    ),
    HFFamily(
        name="phi",
        cls="PhiForCausalLM",
        eps="layer_norm_eps",
        config=_rope_config,
        copied={"qk_layernorm": "qk_norm", "embd_pdrop": "dropout", "resid_pdrop": "dropout"},
        silent={"partial_rotary_factor": 0.5},
        switches=switches("rope", "layernorm", "gelu", parallel_block=(True,), qk_norm=(False, True)),
        layout=Layout(
            names=llama_names(norm="final_layernorm", o_proj="dense", up_proj="fc1", down_proj="fc2", **HEAD_NORMS),
            biased=(*BIASED, "q_norm", "k_norm", "lm_head"),
            untied=True,
        ),
    ),
    HFFamily(
        name="stablelm",
        cls="StableLmForCausalLM",
        eps="layer_norm_eps",
        config=lambda config, n_ctx: _rope_config(config, n_ctx) | {"use_qkv_bias": config.bias != "none"},
        copied={"qk_layernorm": "qk_norm", "use_parallel_residual": "parallel_block", "hidden_dropout": "dropout"},
        silent={"partial_rotary_factor": 0.25},
        switches=STABLELM,
        layout=Layout(names=llama_names(**HEAD_NORMS), biased=NORM_MODULES, head_norms="listed"),
    ),
    HFFamily(
        name="cohere2",
        cls="Cohere2ForCausalLM",
        eps="layer_norm_eps",
        config=_window_config,
        fixed={"logit_scale": 1.0},
        silent={"logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096},
        layer_types="required",
        switches=COHERE2,
        layout=Layout(names=llama_names(), biased_if_any=("o_proj",), adjacent_rope=True),
    ),
    HFFamily(
        name="llama",
        cls="LlamaForCausalLM",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="mistral",
        cls="MistralForCausalLM",
        config=_window_config,
        silent={"sliding_window": 4096},
        layer_types="optional",  # with them, transformers takes the class of Ministral
        switches=switches("rope", "rmsnorm", "swiglu", head_dim=ANY_HEAD_DIM, bias=("none",), window=(ALL,)),
        read={"window": (FULL, ALL)},
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="qwen3",
        cls="Qwen3ForCausalLM",
        config=_window_config,
        silent={"use_sliding_window": False},
        layer_types="required",
        switches=QWEN3 | {"window": (FULL, ALL, MIXED)},
        layout=LLAMA_LAYOUT,
    ),
    HFFamily(
        name="arcee",
        cls="ArceeForCausalLM",
        config=_rope_config,
        switches=switches("rope", "rmsnorm", "gelu", "relu2", head_dim=ANY_HEAD_DIM),
        layout=LLAMA_LAYOUT,
    ),
)
TRANSFORMERS = Target("transformers", HF_FAMILIES, "export.hf=false")
