"""Low-rank adapters (Hu et al., https://arxiv.org/abs/2106.09685), added to the frozen matrices of a model.

V vocab_size, C n_embd.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.gpt import GPT, TIED
from tinygpt.model.layers import Embedding, Linear

ADAPTER = ("lora_A", "lora_B")  # the names that the PEFT library uses


class Adapted(nn.Module):
    """A frozen layer, `base`, with an adapter: only A and B, the weights of `lora_A` and `lora_B`, are trained."""

    base: nn.Linear | nn.Embedding
    lora_A: nn.Linear | nn.Embedding
    lora_B: nn.Linear
    scale: float

    @property
    def weight(self) -> Tensor:
        """The layer's weight with the adapter in it, computed at each access: the loss needs that of the head."""
        return self.merged(self.base.weight, self.lora_A.weight, self.lora_B.weight)

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """A weight with an adapter in it."""
        return weight + self.scale * (b @ a)


class LoRALinear(Adapted):
    """base(x) + alpha / rank · B(A(dropout(x))); A is (rank, in) and B (out, rank), from zero."""

    def __init__(
        self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, dropout
        device = base.weight.device
        self.lora_A = Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = Linear(rank, base.out_features, bias=False, device=device)
        _draw(self.lora_A.weight, generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        dropped = F.dropout(x, self.dropout, self.training)
        product: Tensor = self.base(x) + self.scale * self.lora_B(self.lora_A(dropped))
        return product


class LoRAEmbedding(Adapted):
    """base(ids) + alpha / rank · B(A(ids)); A is (V, rank), from zero, and B (C, rank)."""

    def __init__(self, base: nn.Embedding, *, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        device = base.weight.device
        self.lora_A = Embedding(base.num_embeddings, rank, device=device)
        self.lora_B = Linear(rank, base.embedding_dim, bias=False, device=device)
        nn.init.zeros_(self.lora_A.weight)
        _draw(self.lora_B.weight, generator)

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """A weight with an adapter in it."""
        return super().merged(weight, b.T, a)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C)"""
        embedded: Tensor = self.base(ids) + self.scale * self.lora_B(self.lora_A(ids))
        return embedded


def _draw(weight: Tensor, generator: torch.Generator | None) -> None:
    """Set the initial values of an adapter's matrix that does not begin at zero."""
    drawn = torch.empty(weight.shape)  # on the CPU: the same on every device
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


def add_lora(
    model: GPT,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Collection[str] | None,
    generator: torch.Generator | None,
) -> None:
    """Freeze a model and add adapters to its matrices.

    `targets` are their names, such as "q_proj"; None = all but learned positions and an embedding that is also the
    head.
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        is_shared = model.config.tie_weights and leaf in ("tok_emb", "lm_head")
        if is_shared or not (targets is None or leaf in targets):
            continue
        if isinstance(layer, nn.Linear):
            share = 0.0 if leaf == "lm_head" else dropout  # the loss takes the head's weight, not its forward pass
            adapted: Adapted = LoRALinear(layer, rank=rank, alpha=alpha, dropout=share, generator=generator)
        elif isinstance(layer, nn.Embedding) and leaf == "tok_emb":
            adapted = LoRAEmbedding(layer, rank=rank, alpha=alpha, generator=generator)
        else:
            continue
        setattr(model.get_submodule(owner), leaf, adapted)


def trained_tensors(model: GPT) -> dict[str, Tensor]:
    """The tensors that training changes, by name: the adapters if there are any, else all but a tied head."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_tensors(model: GPT, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under a plain model's names: `trained` ones replace the model's, adapters are added to weights."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    merged: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict() | trained).items():
        module, _, kind = name.rpartition(".")
        owner = module.removesuffix(".base")
        if module.endswith(ADAPTER) or (name == TIED and model.config.tie_weights):
            continue
        if owner in adapters and kind == "weight":
            a, b = (trained[f"{owner}.{part}.weight"].to(tensor.device) for part in ADAPTER)
            tensor = adapters[owner].merged(tensor, a, b)
        merged[f"{owner}.{kind}"] = tensor
    return merged
