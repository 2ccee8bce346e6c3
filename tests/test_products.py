"""Which library multiplies float32 matrices on a CPU."""

import pytest
import torch
from conftest import random_ids, tiny_model
from test_train import PARAMS, RUNTIME
from torch import nn

from tinygpt.generate import compiled
from tinygpt.generate.decoder import STEPS
from tinygpt.generate.lean import FastProduct
from tinygpt.model import attention, products
from tinygpt.model.products import FEW_ROWS, fast_products, onednn_is_faster, onednn_multiplies
from tinygpt.report.perplexity import token_nll
from tinygpt.train.learner import Learner

CPU, LIBRARY = torch.device("cpu"), torch.backends.mkldnn.matmul


@pytest.fixture
def amd(monkeypatch):
    """A CPU of AMD's with AVX-512 that computes in float32, whatever it is."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def error() -> float:
    """The largest error of a float32 product, as a share of the largest value."""
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ x.double().mT
    return float((x @ x.mT - exact).abs().max() / exact.abs().max())


def test_products_are_as_exact_as_float32_allows():
    with fast_products(CPU):
        assert error() < 1e-6


@pytest.mark.parametrize("is_amd", [True, False])
@pytest.mark.parametrize("has_avx512", [True, False])
def test_onednn_multiplies_on_amd_s_cpus_with_avx512_if_it_computes_in_float32(is_amd, has_avx512, monkeypatch):
    monkeypatch.setattr(products, "_is_amd", lambda: is_amd)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    LIBRARY.fp32_precision = "bf16"
    exact = error() < 1e-6  # not on a CPU with AMX
    LIBRARY.fp32_precision = "none"
    assert onednn_is_faster.__wrapped__() == (is_amd and has_avx512 and exact)


def test_the_library_is_changed_on_a_cpu_and_put_back(amd):
    for device, expected in (("cpu", True), ("meta", False)):
        with pytest.raises(ZeroDivisionError), fast_products(torch.device(device)):
            assert (LIBRARY.fp32_precision == "bf16") == onednn_multiplies() == expected
            raise ZeroDivisionError
        assert LIBRARY.fp32_precision == "none" and not onednn_multiplies()


def seen_in(model: nn.Module) -> set[bool]:
    """A set to which each later forward pass of a matrix adds whether oneDNN multiplied."""
    found = set[bool]()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *_: found.add(onednn_multiplies()))
    return found


def test_training_and_evaluation_use_the_faster_library(amd):
    model = tiny_model()
    learner = Learner(model, PARAMS, RUNTIME, device=CPU)
    ids, found = torch.stack([random_ids(model.config.block_size + 1)] * 4), seen_in(model)
    learner.learn(0, ids)
    learner.rehearse(2)
    learner.loss_of(model, ids)
    token_nll(model, random_ids(30).numpy(), context=8, stride=8)
    assert found == {True}


@pytest.mark.parametrize("n_row", [1, FEW_ROWS, FEW_ROWS + 1, 100])
def test_products_of_many_rows_use_the_faster_library(n_row, amd, monkeypatch):
    found, layer = [], nn.Linear(16, 8)
    for name in ("mm", "bmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, f=original: found.append(onednn_multiplies()) or f(*args))
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: found.append(onednn_multiplies()) or linear(*args))
    x = torch.randn(n_row, 16)
    with torch.inference_mode():
        assert FastProduct(layer)(x).shape == (n_row, 8)  # test_lean.py compares values
    assert found == [n_row > FEW_ROWS]


def test_float32_rows_beyond_a_few_are_not_compiled_there(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # it takes seconds
    float32, bfloat16 = tiny_model(), tiny_model().bfloat16()
    for faster, expected in ((True, FEW_ROWS), (False, 32)):
        monkeypatch.setattr(compiled, "onednn_is_faster", lambda faster=faster: faster)
        for model in (float32, bfloat16):
            compiled.compile_step(model, n_row=32)
        assert (STEPS[float32].n_row, STEPS[bfloat16].n_row) == (expected, 32)


@pytest.mark.parametrize("window", [None, 3])
def test_written_out_attention_is_the_same(window, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 9, 8, generator=generator).requires_grad_() for n in (4, 2, 2))
    mask = attention.attention_mask(9, window, CPU)
    gradients = []
    for written_out in (True, False):
        monkeypatch.setattr(attention, "onednn_multiplies", lambda written_out=written_out: written_out)
        y = attention.sdpa_attention(q, k, v, mask)
        assert ("Dot" in y.grad_fn.name()) != written_out
        gradients.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
