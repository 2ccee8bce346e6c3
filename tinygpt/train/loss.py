"""The training loss.  B batch, T tokens, V vocab_size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model import GPT


class Loss(nn.Module):
    """What training makes small: `loss(ids)`, (B, T + 1) int64 -> mean nats per token and what is added to it."""

    def __init__(self, model: GPT, precision: torch.dtype, **extra: float) -> None:
        """`extra` is what `next_token_loss` takes."""
        super().__init__()
        self.model, self.precision, self.extra = model, precision, extra

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T + 1) -> ()"""
        with torch.autocast(ids.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(ids[:, :-1])
        return next_token_loss(logits, ids[:, 1:], **self.extra)


def next_token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Mean nats per target token, in float32.  (B, T, V), (B, T) int64 -> ()

    `z_loss` adds that share of the mean squared logarithm of the sum of exp(logits), which keeps it near 0 (Chowdhery
    et al., https://arxiv.org/abs/2204.02311).
    """
    logits = logits.flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss
