"""How long the gradient of each part of a model is."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tinygpt.model.gpt import GPT
from tinygpt.model.lora import trained_tensors
from tinygpt.train.parallel import whole


def part_norms(model: GPT) -> dict[str, Tensor]:
    """The 2-norm of the gradient of each block and of what stands before and behind them, as numbers on the device."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in trained_tensors(model).items():
        if parameter.grad is not None:
            first, second, *_ = name.split(".")
            parts[f"block_{second}" if first == "blocks" else first].append(whole(parameter.grad.norm()))
    return {part: torch.stack(norms).norm() for part, norms in parts.items()}
