"""Which library multiplies float32 matrices on a CPU.

PyTorch takes float32 products from MKL, which uses AVX-512 on Intel's CPUs only. oneDNN, which PyTorch also contains,
uses it on AMD's as well: products of many rows take half the time there (docs/performance.md).
"""

import functools
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

FEW_ROWS = 8  # with no more rows than this, MKL is faster on every CPU
_in_use = False


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """A context in which a CPU multiplies float32 matrices with the library that is faster for many rows.

    It holds for the whole process: when several threads are in it, the first to leave ends it for all. It leaves
    PyTorch's default setting behind.
    """
    if device.type == "cpu" and onednn_is_faster():
        with _onednn():
            yield
    else:
        yield


def onednn_multiplies() -> bool:
    """Whether oneDNN multiplies float32 matrices now, instead of MKL."""
    return _in_use


@functools.cache
def onednn_is_faster() -> bool:
    """Whether the CPU is one of AMD's with AVX-512, and oneDNN computes in float32 on it."""
    if not (_is_amd() and torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()):
        return False
    value = 1 + 2**-20  # 1 in bfloat16
    matrix = torch.full((64, 64), value, dtype=torch.float32, device="cpu")
    with _onednn():
        return bool((matrix @ torch.eye(64, dtype=torch.float32, device="cpu") == value).all())


@contextmanager
def _onednn() -> Iterator[None]:
    """A context in which oneDNN multiplies float32 matrices.

    PyTorch lets it do so only if bfloat16 is good enough. It computes in bfloat16 on CPUs with AMX, and in float32 on
    all others. Meanwhile torch.get_float32_matmul_precision() raises RuntimeError.
    """
    global _in_use
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    products.fp32_precision, _in_use = "bf16", True
    try:
        yield
    finally:
        products.fp32_precision, _in_use = "none", False  # not what it was: that may be another thread's "bf16"


def _is_amd() -> bool:
    if sys.platform == "win32":
        return "AuthenticAMD" in platform.processor()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return "AuthenticAMD" in file.read(1000)
    return False
