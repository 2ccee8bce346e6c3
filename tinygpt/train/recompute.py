"""Gradient checkpointing (Chen et al., https://arxiv.org/abs/1604.06174): less memory for a third more operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinygpt.model.gpt import GPT


def recompute_blocks(model: GPT) -> None:
    """Let each block keep its input alone, and compute the rest again in the backward pass, with the same dropout."""
    for block in model.blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    result: Tensor = checkpoint(forward, *args, use_reentrant=False)
    return result
