"""The training loss.  B batch, T tokens, V vocab_size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target token, in float32.  (B, T, V), (B, T) int64 -> ()"""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
