"""Which library multiplies float32 matrices on a CPU."""

import pytest
import torch

from tinygpt import runtime
from tinygpt.model import attention
from tinygpt.runtime import FEW_ROWS, fast_products

CPU, LIBRARY = torch.device("cpu"), torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def forgotten():
    """What was found out about the CPU is forgotten before and after each test."""
    runtime.onednn_is_faster.cache_clear()
    yield
    runtime.onednn_is_faster.cache_clear()


def error() -> float:
    """The largest error of a float32 product, as a share of the largest value."""
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ x.double().mT
    return float((x @ x.mT - exact).abs().max() / exact.abs().max())


def test_products_are_as_exact_as_float32_allows_and_the_library_is_put_back():
    before = LIBRARY.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products(CPU), fast_products(CPU):
        assert error() < 1e-6
        raise ZeroDivisionError
    assert LIBRARY.fp32_precision == before


def test_a_cpu_of_amd_s_uses_onednn_for_many_rows_if_it_computes_in_float32(monkeypatch):
    monkeypatch.setattr(runtime, "is_amd", lambda: True)
    before = LIBRARY.fp32_precision
    LIBRARY.fp32_precision = "bf16"
    exact = error() < 1e-6  # not on a CPU with AMX
    LIBRARY.fp32_precision = before
    assert runtime.onednn_is_faster() == exact
    for n_row, expected in ((FEW_ROWS, before), (FEW_ROWS + 1, "bf16" if exact else before)):
        with fast_products(CPU, n_row=n_row):
            assert LIBRARY.fp32_precision == expected


def test_other_cpus_and_devices_keep_their_library(monkeypatch):
    before = LIBRARY.fp32_precision
    with fast_products(torch.device("meta")):
        assert LIBRARY.fp32_precision == before
    monkeypatch.setattr(runtime, "is_amd", lambda: False)
    with fast_products(CPU):
        assert LIBRARY.fp32_precision == before


@pytest.mark.parametrize("window", [None, 3])
def test_attention_that_is_written_out_for_training_is_the_same(window, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 9, 8, generator=generator).requires_grad_() for n in (4, 2, 2))
    mask = attention.attention_mask(9, window, CPU)
    gradients = []
    for written_out in (True, False):
        monkeypatch.setattr(attention, "WRITTEN_OUT_IS_FASTER", written_out)
        y = attention.sdpa_attention(q, k, v, mask)
        assert ("Dot" in y.grad_fn.name()) != written_out
        gradients.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
