"""The training loss, computed from the last hidden states, and the number formats of matrix products.

Weights, gradients and optimizer state stay in float32.  B batch, T tokens, N = B · T, C n_embd, V vocab_size.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinygpt.model.gpt import GPT

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, or `repeatable` raises

# Logits computed at a time: 64 MiB of float32. That is a whole step of a small model, or 333 rows of 50,257 tokens,
# whose products are still large enough for full speed (333 rows took no longer than 1,024; 128 took a third longer).
# On a GPU 1 GiB: each part reads and writes the head's gradient, and torch.compile unrolls the loop over the parts.
CHUNK = {"cpu": 2**24, "mps": 2**24, "cuda": 2**28}


class Loss(nn.Module):
    """What training minimizes: `loss(ids)`, (B, T + 1) int64 -> mean nats per token plus the extra terms."""

    def __init__(self, model: GPT, precision: str, **extra: float) -> None:
        """`extra` are keyword arguments of `next_token_loss`."""
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

    It adds `z_loss` times the mean squared logarithm of the sum of exp(logits), which keeps that logarithm near 0
    (Chowdhery et al., https://arxiv.org/abs/2204.02311). The result can be differentiated once.
    """
    head = head if torch.is_grad_enabled() else head.detach()  # an evaluation needs no gradient of it
    total: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), label_smoothing, z_loss)
    return total / targets.numel()


class _HeadLoss(torch.autograd.Function):
    """The sum over tokens of F.cross_entropy(hidden @ head.T, targets) + z_loss · logsumexp², some tokens at a time.

    The gradient is computed in the forward pass, in the memory of the logits, so logits are never held for all tokens
    or twice (as in Hsu et al., https://arxiv.org/abs/2410.10989). Products are in autocast's type, the rest in
    float32. The sum is divided by N outside, because a gradient divided by N would vanish in float16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """(N, C), (V, C), (N,) -> ()"""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        weight, size = head.to(dtype), max(1, CHUNK[device] // len(head))
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
            del logits  # as large as logprobs
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
        """() -> the gradients of forward's arguments"""
        d_hidden, d_head = ctx.saved_tensors
        return *(d if d is None else d.mul_(grad) for d in (d_hidden, d_head)), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without memory for the product where the types are the same."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


PRECISIONS = {  # choices of train.precision other than auto: the type of products, None = that of the weights
    "fp32": None,
    "tf32": None,  # a GPU cuts the mantissa of float32 to 10 bits; elsewhere the same as fp32
    "bf16": torch.bfloat16,  # the range of float32, a mantissa of 7 bits; older CPUs emulate it, slowly
    "fp16": torch.float16,  # for older GPUs; the loss is scaled so that gradients do not vanish
}
# n_embd: a step of 1024 tokens in bf16 took 1.1 times as long at 128 with AMX, 0.9 at 192, 0.7 at 384; with AVX512-BF16
# it took 0.8 times as long at all of them
WORTH_CASTS = 192


def pick_precision(precision: str, device: torch.device, n_embd: int) -> str:
    """The precision that "auto" stands for: bf16 if the device has units for it, else fp32.

    The choice follows from the device's features, not from a timing, which might differ when the run continues and so
    change its weights. CPUs take bf16 only with AMX or AVX512-BF16, and only for models whose products are worth the
    casts.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and has_units and n_embd >= WORTH_CASTS else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context in which products are taken in this precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Let a GPU compute float32 products in tf32, or not, in the whole process: PyTorch has no narrower switch."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """A context in which a GPU computes the same bits each time, as a resumed run must.

    Without it, attention and embeddings sum gradients in any order. It is not set for the whole process, because
    drawing the next token has no deterministic kernel on a GPU.
    """
    if device.type != "cuda":
        yield
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none of it is read
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
