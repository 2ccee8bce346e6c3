"""What other programs call our modules; {i} stands for the block. A name in no model of a kind is not looked up."""

from __future__ import annotations

from collections.abc import Mapping

NORMS = ("attn_norm", "mlp_norm", "norm")  # our modules whose bias many programs demand

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
