"""The GPT: a decoder-only transformer. Its switches choose the parts once, when it is built.

B batch, T tokens, C n_embd, V vocab_size, D head_dim.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tinygpt.model.attention import Attention, Masks, attention_mask
from tinygpt.model.config import GPTConfig
from tinygpt.model.layers import MLP, NORMS, Embedding, Linear, Rope

INIT_STD = 0.02
TIED = "lm_head.weight"  # with model.tie_weights, another name for the token embedding


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or in parallel x + attention(norm(x)) + mlp(norm(x)), one norm."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        norm = partial(NORMS[config.norm], config.n_embd, eps=config.norm_eps, bias=config.bias == "all")
        self.attn_norm = norm()
        self.attn = Attention(config, layer)
        self.mlp_norm = None if config.parallel_block else norm()
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, masks: Masks) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        normed = self.attn_norm(x)
        attended = self.dropout(self.attn(normed, rope, masks))
        if self.mlp_norm is None:
            return x + attended + self.dropout(self.mlp(normed))
        x = x + attended
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A language model: `model(ids)` gives the logits of each next token.

    `init=False` leaves the weights unset, to be filled from a file: drawing them takes longer than reading them.
    """

    def __init__(self, config: GPTConfig, *, init: bool = True, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.pos_emb = Embedding(config.block_size, config.n_embd) if learned else None
        self.rope = None if learned else Rope(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.windows = config.windows
        self.norm = NORMS[config.norm](config.n_embd, eps=config.norm_eps, bias=config.bias == "all")
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if init:
            init_weights(self, generator)
        if config.tie_weights:
            self.lm_head.weight = self.tok_emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)"""
        logits: Tensor = self.lm_head(self.hidden(ids))
        return logits

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> the last block's normed output (B, T, C), for callers that need only some logits."""
        t = ids.size(1)
        assert t <= self.config.block_size, f"{t} tokens, but block_size is {self.config.block_size}"
        x = self.tok_emb(ids)
        rope = None if self.rope is None else self.rope(t)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:t]
        masks = {window: attention_mask(t, window, ids.device) for window in self.windows}
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, masks)
        normed: Tensor = self.norm(x)
        return normed

    def set_dropout(self, share: float) -> None:
        """Change the share of values that training sets to zero, in every layer."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    def n_params(self) -> int:
        """Number of distinct weights (a tied matrix counts once)."""
        return sum(p.numel() for p in self.parameters())


def init_weights(model: GPT, generator: torch.Generator | None) -> None:
    """Set every weight in module order, from one generator: normal, with the standard deviation INIT_STD.

    Biases are zero, and so are o_proj and down_proj, which end in the residual stream: each block begins as the
    identity (Zhang et al., https://arxiv.org/abs/1901.09321). Norms keep PyTorch's ones.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            if name.endswith(("o_proj", "down_proj")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
