"""What other programs call our modules; {i} stands for the block. A name in no model of a kind is not looked up."""

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
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "blocks.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "blocks.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}

LLAMA_NAMES = {
    "tok_emb": "model.embed_tokens",
    "blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "norm": "model.norm",
    "lm_head": "lm_head",
} | {
    f"blocks.{{i}}.{part}.{leaf}": f"model.layers.{{i}}.{hf_part}.{leaf}"
    for part, hf_part, leaves in (
        ("attn", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        ("mlp", "mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for leaf in leaves
}

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
