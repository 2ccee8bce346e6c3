"""The training loss, from the last hidden state on.  B batch, T tokens, N = B · T, C n_embd, V vocab_size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinygpt.model.gpt import GPT
from tinygpt.train.precision import autocast

# Logits worked on together: 64 MiB of float32. All of them in a small model's step; of 50,257 tokens' logits 333 rows,
# which still make products large enough to run at full speed (333 took no longer than 1,024, 128 a third longer).
CHUNK = 2**24


class Loss(nn.Module):
    """What training makes small: `loss(ids)`, (B, T + 1) int64 -> mean nats per token and what is added to it."""

    def __init__(self, model: GPT, precision: str, **extra: float) -> None:
        """`extra` is what `next_token_loss` takes."""
        super().__init__()
        self.model, self.precision, self.extra = model, precision, extra

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T + 1) -> ()"""
        with autocast(self.precision, ids.device):
            hidden = self.model.hidden(ids[:, :-1])
            return next_token_loss(hidden, self.model.lm_head.weight, ids[:, 1:], **self.extra)


def next_token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Mean nats per target token, in float32.  (B, T, C), (V, C) the head's weight, (B, T) int64 -> ()

    `z_loss` adds that share of the mean squared logarithm of the sum of exp(logits), which keeps it near 0 (Chowdhery
    et al., https://arxiv.org/abs/2204.02311). The result can be differentiated once.
    """
    total: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), label_smoothing, z_loss)
    return total / targets.numel()


class _HeadLoss(torch.autograd.Function):
    """The sum over tokens of F.cross_entropy(hidden @ head.T, targets) + z_loss · logsumexp², some tokens at a time.

    The gradient is made in the forward pass, in the memory of the logits, so these are never held for all tokens and
    never twice (as Hsu et al. do, https://arxiv.org/abs/2410.10989). Products are in autocast's type, the rest in
    float32. Sums are taken here and divided by N outside: a gradient divided by N would vanish in float16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """(N, C), (V, C), (N,) -> ()"""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        weight, size = head.to(dtype), max(1, CHUNK // len(head))
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), device=hidden.device, dtype=exact)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            h, target = hidden[part].to(dtype), targets[part, None]
            logits = F.linear(h, weight)  # (n, V)
            logprobs = logits.log_softmax(-1, dtype=exact)
            right = logprobs.gather(1, target)
            log_sum = logits.gather(1, target) - right
            del logits  # of the size of logprobs
            losses = z_loss * log_sum.square() - (1 - smoothing) * right
            if smoothing:
                losses -= smoothing * logprobs.mean(-1, keepdim=True)
            total += losses.sum()
            if d_hidden is None and d_head is None:
                continue
            d_logits = logprobs.exp_()
            if z_loss:
                d_logits *= 1 + 2 * z_loss * log_sum
            if smoothing:
                d_logits -= smoothing / len(head)
            d_logits = d_logits.scatter_add_(1, target, torch.full_like(right, smoothing - 1)).to(dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_head is not None:
                _add_product(d_head, d_logits.mT, h)
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """() -> those of forward's arguments"""
        d_hidden, d_head = ctx.saved_tensors
        return *(d if d is None else d.mul_(grad) for d in (d_hidden, d_head)), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a product beside it where the types are the same."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
