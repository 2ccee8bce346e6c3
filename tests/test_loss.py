"""The loss from the last hidden states: by hand, and compared with PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinygpt.train import loss
from tinygpt.train.loss import next_token_loss


def inputs(n=7, v=11, c=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, n, c, generator=generator, dtype=dtype, requires_grad=True)
    head = (2 * torch.randn(v, c, generator=generator, dtype=dtype)).requires_grad_()
    return hidden, head, torch.randint(v, (2, n), generator=generator)


def reference(hidden, head, targets, *, label_smoothing=0.0, z_loss=0.0):
    """The loss from all logits at once, with PyTorch's own functions."""
    logits = (hidden @ head.mT).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)
    return plain + z_loss * logits.logsumexp(-1).square().mean()


def test_the_loss_of_three_tokens_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]]])
    targets = torch.tensor([[0, 0, 0]])
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert next_token_loss(logits, torch.eye(2), targets).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "extra", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.5}, {"label_smoothing": 0.2, "z_loss": 0.1}]
)
@pytest.mark.parametrize("chunk", [1, 33, 100, 10_000])  # logits, 11 a token: 1, 3, 9 and all 14 tokens
def test_loss_and_gradient_are_pytorchs_whatever_the_chunk(extra, chunk, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
    hidden, head, targets = inputs()
    ours, theirs = next_token_loss(hidden, head, targets, **extra), reference(hidden, head, targets, **extra)
    torch.testing.assert_close(ours, theirs)
    got, wanted = (torch.autograd.grad(3 * each, (hidden, head)) for each in (ours, theirs))
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert next_token_loss(hidden, head, targets, **extra).item() == ours.item()


def test_an_evaluation_computes_no_gradient(monkeypatch):
    hidden, head, targets = inputs()
    expected = next_token_loss(hidden, head, targets)
    monkeypatch.setattr(loss, "_add_product", None)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            assert next_token_loss(hidden.detach(), head, targets) == expected


def test_the_gradient_is_exact_in_float64_and_given_once(monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 33)
    hidden, head, targets = inputs(dtype=torch.float64)
    ours, theirs = (f(hidden, head, targets, label_smoothing=0.1, z_loss=0.1) for f in (next_token_loss, reference))
    got, wanted = (torch.autograd.grad(each, (hidden, head), retain_graph=True) for each in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ours, (hidden, head))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_has_no_gradient_and_the_other_has_its_own(frozen):
    hidden, head, targets = inputs()
    both = dict(
        zip(("hidden", "head"), torch.autograd.grad(reference(hidden, head, targets), (hidden, head)), strict=True)
    )
    tensors = {"hidden": hidden, "head": head}
    tensors.pop(frozen).requires_grad_(False)
    next_token_loss(hidden, head, targets).backward()
    ((name, trained),) = tensors.items()
    torch.testing.assert_close(trained.grad, both[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_change_the_loss_by_no_more_than_their_rounding(dtype, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 33)
    hidden, head, targets = inputs(n=50)
    with torch.autocast("cpu", dtype):
        ours = next_token_loss(hidden, head, targets)
    assert ours.dtype == torch.float32
    grads = torch.autograd.grad(ours, (hidden, head))
    theirs = reference(hidden, head, targets)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for got, wanted in zip(grads, torch.autograd.grad(theirs, (hidden, head)), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_gradients_of_many_tokens_do_not_vanish_in_float16():
    hidden, head, targets = inputs(n=4000, v=300)
    with torch.autocast("cpu", torch.float16):
        d_hidden, _ = torch.autograd.grad(next_token_loss(hidden, head, targets), (hidden, head))
    wanted, _ = torch.autograd.grad(reference(hidden, head, targets), (hidden, head))
    assert (d_hidden - wanted).norm() < 0.01 * wanted.norm()
