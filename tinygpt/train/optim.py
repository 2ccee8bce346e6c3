"""The optimizer: which weights it decays, and its state as named tensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import AdamW

from tinygpt.model import GPT
from tinygpt.model.lora import trained_tensors
from tinygpt.train.config import TrainParams


def build_optimizer(model: GPT, params: TrainParams) -> AdamW:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) that decays matrices only."""
    decayed = decayed_names(model)
    named = trained_tensors(model)
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": params.weight_decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=params.lr, betas=params.betas, fused=True)


def decayed_names(model: GPT) -> set[str]:
    """Names of the linear layers' matrices; a head that is the token embedding is not among them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings
    }


def optimizer_tensors(model: GPT, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's state as "<weight>/<what>": tensor; empty before the first step."""
    return {
        f"{name}/{what}": value
        for name, parameter in trained_tensors(model).items()
        for what, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: GPT, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on each weight's device."""
    named = trained_tensors(model)
    for key, value in tensors.items():
        name, what = key.split("/")
        optimizer.state[named[name]][what] = value.to(named[name].device)
