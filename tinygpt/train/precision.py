"""Number formats of training: weights, gradients and optimizer state stay in float32, products may be shorter.

| precision | products | where |
|---|---|---|
| fp32 | float32 | everywhere |
| tf32 | float32 with the mantissa cut to 10 bits | a GPU; elsewhere the same as fp32 |
| bf16 | bfloat16, as wide as float32 and 7 bits fine | a GPU; CPUs without AMX emulate it, slowly |
| fp16 | float16, whose gradients are scaled so that they do not vanish | older GPUs |
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

WORTH_CASTS = 192  # n_embd: at 128 a step of 1024 tokens took 1.1 times as long in bf16, at 192 0.9, at 384 0.7
SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(precision: str, device: torch.device, n_embd: int) -> str:
    """The precision that "auto" stands for: bf16 where the device's own units multiply it, else fp32.

    By the device's features and not by a timing, which might choose otherwise when the run goes on, and so change its
    weights. Of CPUs only those with AMX, and of their models those whose products are worth the casts: AVX512-BF16
    doubles the speed of products at most, which casts take back.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_units = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16" if has_units and n_embd >= WORTH_CASTS else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context in which products are taken in this precision."""
    return torch.autocast(device.type, SHORT.get(precision), enabled=precision in SHORT)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Let a GPU take float32 products as tf32, or not.  For the whole process: PyTorch has no narrower switch."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def build_scaler(precision: str, device: torch.device) -> GradScaler:
    """What scales the loss up and gradients down again, as much as float16 allows; of other precisions, nothing."""
    return GradScaler(device.type, enabled=precision == "fp16")


def scaler_tensors(scaler: GradScaler) -> dict[str, Tensor]:
    """Its state as "loss_scale/<what>": tensor, for a checkpoint; empty where it does nothing."""
    state = scaler.state_dict()
    return {f"loss_scale/{key}": torch.tensor(state[key]) for key in ("scale", "_growth_tracker") if state}


def load_scaler_tensors(scaler: GradScaler, tensors: dict[str, Tensor]) -> None:
    """Put back what `scaler_tensors` gave."""
    if state := scaler.state_dict():
        kept = {key: tensors[f"loss_scale/{key}"].item() for key in ("scale", "_growth_tracker")}
        scaler.load_state_dict(state | kept)
