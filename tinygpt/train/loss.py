"""The training loss.  B batch, T tokens, V vocab_size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Mean nats per target token, in float32.  (B, T, V), (B, T) int64 -> ()

    `z_loss` adds that share of the mean squared logarithm of the sum of exp(logits), which keeps it near 0 (Chowdhery
    et al., https://arxiv.org/abs/2204.02311).
    """
    logits = logits.flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss
