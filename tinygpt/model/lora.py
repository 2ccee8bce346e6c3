"""Low-rank adapters (Hu et al., https://arxiv.org/abs/2106.09685), added to the frozen linear layers of a model."""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.gpt import GPT, TIED
from tinygpt.model.layers import Linear

ADAPTER = ("lora_A", "lora_B")  # the names that the PEFT library uses


class LoRALinear(nn.Module):
    """base(x) + alpha / rank · B(A(dropout(x))); only A (rank, in) and B (out, rank) are trained, B from zero."""

    def __init__(
        self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, dropout
        device = base.weight.device
        self.lora_A = Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = Linear(rank, base.out_features, bias=False, device=device)
        first = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)  # on the CPU: the same on every device
        with torch.no_grad():
            self.lora_A.weight.copy_(first)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        dropped = F.dropout(x, self.dropout, self.training)
        return self.base(x) + self.scale * self.lora_B(self.lora_A(dropped))


def add_lora(
    model: GPT, *, rank: int, alpha: float, dropout: float, targets: Collection[str], generator: torch.Generator | None
) -> None:
    """Freeze a model and add adapters to the linear layers of its blocks that `targets` names, such as "q_proj"."""
    model.requires_grad_(False)
    for block in model.blocks.modules():
        for name, layer in list(block.named_children()):
            if name in targets and isinstance(layer, nn.Linear):
                adapted = LoRALinear(layer, rank=rank, alpha=alpha, dropout=dropout, generator=generator)
                setattr(block, name, adapted)


def trained_tensors(model: GPT) -> dict[str, Tensor]:
    """The tensors that training changes, by name: the adapters if there are any, else all but a tied head."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_tensors(model: GPT, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under a plain model's names: `trained` ones replace the model's, adapters are added to weights."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    merged: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict() | trained).items():
        module, _, kind = name.rpartition(".")
        owner = module.removesuffix(".base")
        if module.endswith(ADAPTER) or (name == TIED and model.config.tie_weights):
            continue
        if owner in adapters and kind == "weight":
            a, b = (trained[f"{owner}.{part}.weight"].to(tensor.device) for part in ADAPTER)
            tensor = tensor + adapters[owner].scale * (b @ a)
        merged[f"{owner}.{kind}"] = tensor
    return merged
