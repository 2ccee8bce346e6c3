"""Weights of 8 and 4 bits: close to the originals, smaller, and the same for any number of tokens at once."""

import pytest
import torch
from conftest import FAMILIES, random_ids, tiny_model
from torch import nn

from tinygpt.errors import UserError
from tinygpt.generate.decoder import Decoder
from tinygpt.model.quantize import QUANTIZED, Int4Linear, Int4LinearCPU, Int8Linear, int4_linear, quantize

ERRORS = {"int8": 0.01, "int4": 0.11}  # Gaussian weights have errors of 0.5 % and 7 %; bfloat16 adds to them


def n_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def layer(n_in: int = 96, n_out: int = 48, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=bias).eval()


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near_those_of_the_weights(kind, bias):
    linear = layer(bias=bias)
    quantized = QUANTIZED[kind](linear)
    for shape in ((96,), (1, 1, 96), (2, 5, 96), (3, 40, 96)):
        x = torch.randn(shape)
        with torch.inference_mode():
            expected, found = linear(x), quantized(x)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert (found - expected).norm() / expected.norm() < ERRORS[kind]


def test_weights_of_few_values_are_stored_exactly():
    linear = layer(32, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-7, 9, (16, 32)).float())
        linear.weight[:, 0], linear.weight[:, 1] = -7, 8  # so that every group and row spans the same steps
    eye = torch.eye(32)
    assert torch.equal(Int4Linear(linear)(eye), linear(eye))
    assert torch.equal(Int4LinearCPU(linear)(eye), linear(eye))
    with torch.no_grad():
        linear.weight[:, 2] = 127
    assert torch.equal(Int8Linear(linear)(eye), linear(eye))


def test_int4_on_a_gpu_is_the_same_as_on_the_cpu_up_to_bfloat16():
    linear = layer()
    x = torch.randn(3, 40, 96)
    here, there = Int4LinearCPU(linear), Int4Linear(linear)  # the latter, for a GPU, works on every device
    assert there.packed.nbytes == linear.weight.numel() // 2
    torch.testing.assert_close(there(x), here(x), atol=0.02, rtol=0.02)
    assert isinstance(int4_linear(linear), Int4LinearCPU)
    assert not isinstance(int4_linear(linear.to("meta")), Int4LinearCPU)


def test_a_row_of_zeros_stays_zero():
    linear = layer(bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    for kind in QUANTIZED.values():
        assert not kind(linear)(torch.randn(3, 96)).any()


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_is_smaller_near_and_decodes_to_the_same(kind, family):
    changes = FAMILIES[family] | {"n_embd": 64, "tie_weights": True, "vocab_size": 304}
    model, ids = tiny_model(**changes), random_ids(1, 20)
    with torch.inference_mode():
        before, size = model(ids).log_softmax(-1), n_bytes(model)
        quantize(model, kind)
        after = model(ids).log_softmax(-1)
        assert n_bytes(model) < 0.75 * size
        assert (after - before).square().mean().sqrt() < {"int8": 0.1, "int4": 1.5}[kind] * before.std()
    decoder = Decoder(model, ids[:, :19].tolist())
    decoder.step(ids[:, 19].tolist())
    torch.testing.assert_close(decoder.logits.log_softmax(-1), after[:, 19], atol=0.1, rtol=0.05)
    assert not isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.tok_emb, nn.Embedding)  # although it shared its matrix with the head


def test_int4_refuses_what_its_blocks_do_not_fit():
    with pytest.raises(UserError, match=r"gate_proj is \(50, 32\), but int4 needs .* and of 32 columns: use int8"):
        quantize(tiny_model(n_hidden=50), "int4")
    with pytest.raises(UserError, match=r"lm_head is \(300, 64\), but int4 needs a multiple of 16 rows"):
        quantize(tiny_model(n_embd=64, vocab_size=300, tie_weights=False), "int4")
