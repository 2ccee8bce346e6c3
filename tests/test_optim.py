"""Each optimizer makes the same step as a reference, and continues from its saved state."""

import math
import sys
from functools import partial

import pytest
import torch
from conftest import random_ids, tiny_model
from test_train import PARAMS, same

from tinygpt.errors import UserError
from tinygpt.model.lora import add_lora, trained_tensors
from tinygpt.model.weights import load_tensors, model_tensors, save_tensors
from tinygpt.train.loss import next_token_loss
from tinygpt.train.optim import (
    OPTIMIZERS,
    build_optimizers,
    kind_of,
    load_optimizer_tensors,
    optimizer_tensors,
    orthogonalized,
    set_lr,
)

N_STEPS = 4
BYTES = {"n_embd": 64, "n_hidden": 64}  # few shapes: torchao compiles a step for each
INSTALLED = [name if name != "adamw8bit" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]


def params_with(**changes):
    return type(PARAMS)(**{**vars(PARAMS), **changes})


def backward(model, step=0):
    ids, targets = random_ids(2, 9, seed=2 * step), random_ids(2, 9, seed=2 * step + 1)
    next_token_loss(model.hidden(ids), model.lm_head.weight, targets).backward()


def train_steps(model, optimizers, steps):
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def groups_of(optimizers):
    return {group["kind"]: group for optimizer in optimizers for group in optimizer.param_groups}


@pytest.mark.parametrize("tie_weights", [True, False])
def test_each_kind_of_weight_has_its_learning_rate_and_decay(tie_weights):
    model = tiny_model(tie_weights=tie_weights, position="learned", norm="layernorm", mlp="gelu", bias="all")
    params = params_with(embedding_lr=0.1, head_lr=0.2, vector_lr=0.3, embedding_weight_decay=0.05)
    optimizers = build_optimizers(model, params)
    set_lr(optimizers, 0.5)
    groups = groups_of(optimizers)
    assert {kind: (g["lr"], g["weight_decay"]) for kind, g in groups.items()} == {
        "embedding": (0.05, 0.05),
        "vector": (0.15, 0.0),
        "matrix": (PARAMS.lr / 2, 0.1),
    } | ({} if tie_weights else {"head": (0.1, 0.1)})
    kinds = {name: kind_of(model, name) for name in trained_tensors(model)}
    assert {kind: len(group["params"]) for kind, group in groups.items()} == {
        kind: list(kinds.values()).count(kind) for kind in groups
    }
    assert {name for name, kind in kinds.items() if kind == "embedding"} == {"tok_emb.weight", "pos_emb.weight"}
    assert all(name.endswith("_proj.weight") for name, kind in kinds.items() if kind == "matrix")
    plain = groups_of(build_optimizers(model, PARAMS))
    assert {group["peak_lr"] for group in plain.values()} == {PARAMS.lr}


def test_one_step_of_adamw_by_hand():
    model = tiny_model()
    optimizers = build_optimizers(model, PARAMS)
    weight, norm = model.blocks[0].mlp.up_proj.weight, model.norm.weight
    before, norm_before = weight.detach().clone(), norm.detach().clone()
    backward(model)
    optimizers[0].step()  # apart from decay, Adam's first step moves each weight by lr · g / (|g| + eps)
    moved = PARAMS.lr * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(weight, before * (1 - PARAMS.lr * PARAMS.weight_decay) - moved, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        norm, norm_before - PARAMS.lr * norm.grad / (norm.grad.abs() + 1e-8), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("tie_weights", [False, True])
def test_adamw_makes_the_steps_and_keeps_the_state_of_torch_adamw_to_the_bit(tie_weights):
    model, reference = (tiny_model(bias="all", tie_weights=tie_weights) for _ in range(2))
    (ours,) = build_optimizers(model, params_with(embedding_lr=0.3))
    kinds = groups_of(build_optimizers(reference, params_with(embedding_lr=0.3))).values()
    theirs = torch.optim.AdamW(
        [{**group, "lr": group["peak_lr"]} for group in kinds], betas=PARAMS.betas, weight_decay=0.0, fused=True
    )
    for step in range(N_STEPS):
        for one, optimizer in ((model, ours), (reference, theirs)):
            backward(one, step)
            if step == 1:
                one.norm.weight.grad = None  # as if this weight took no part
            set_lr([optimizer], 1 / (step + 1))
            optimizer.step()
            optimizer.zero_grad()
            assert all(weight.grad is None for weight in one.parameters())
    assert_close = partial(torch.testing.assert_close, atol=0, rtol=0)
    assert_close(model_tensors(model), model_tensors(reference))
    assert_close(optimizer_tensors(model, [ours]), optimizer_tensors(reference, [theirs]))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_weight_that_never_had_a_finite_gradient_has_no_state_and_training_continues(name):
    model, resumed = tiny_model(), tiny_model()
    optimizers, others = (build_optimizers(one, params_with(optimizer=name)) for one in (model, resumed))
    load_optimizer_tensors(resumed, others, optimizer_tensors(model, optimizers))  # in fp16, all may have overflowed
    assert optimizer_tensors(resumed, others) == {}
    backward(model)
    model.norm.weight.grad = None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    kept = optimizer_tensors(model, optimizers)
    load_optimizer_tensors(resumed, others, kept)
    assert same(optimizer_tensors(resumed, others), kept)
    assert not any(key.startswith("norm.weight/") for key in kept)


def test_muon_makes_the_steps_of_torch_muon_and_adamw_the_others():
    model, reference = tiny_model(n_kv_head=2), tiny_model(n_kv_head=2)
    optimizers = build_optimizers(model, params_with(optimizer="muon", momentum=0.9))
    matrices = [p for name, p in reference.named_parameters() if kind_of(reference, name) == "matrix"]
    others = [p for name, p in reference.named_parameters() if kind_of(reference, name) != "matrix"]
    theirs = [
        torch.optim.Muon(matrices, lr=PARAMS.lr, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PARAMS.lr, betas=PARAMS.betas, weight_decay=0.0),
    ]
    for step in range(N_STEPS):
        for parameters, some in ((model.parameters(), optimizers), (reference.parameters(), theirs)):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                # equally long in all directions: torch iterates in bfloat16, which loses short ones
                parameter.grad = (
                    torch.nn.init.orthogonal_(torch.empty_like(parameter), generator=generator)
                    if parameter.ndim == 2
                    else torch.randn(parameter.shape, generator=generator)
                )
            for optimizer in some:
                optimizer.step()
    start = tiny_model(n_kv_head=2)
    for (name, ours), other, first in zip(
        model.named_parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        moved, expected = (ours - first).detach(), (other - first).detach()
        assert (moved - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_orthogonalized_matrices_have_the_directions_of_the_matrix_and_lengths_about_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) + 8 * torch.eye(*shape)
    found = orthogonalized(matrices)
    for matrix, near in zip(matrices, found, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        lengths = u.T @ near @ v.T
        assert (lengths.diag() - 1).abs().max() < 0.35
        assert (lengths - lengths.diag().diag()).abs().max() < 1e-4


def test_two_steps_of_lion_by_hand():
    model = tiny_model()
    params = params_with(optimizer="lion", betas=(0.9, 0.8))
    optimizers = build_optimizers(model, params)
    weight = model.blocks[0].mlp.up_proj.weight
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(2):
        backward(model, step)
        gradient = weight.grad.clone()
        expected = expected * (1 - PARAMS.lr * 0.1) - PARAMS.lr * (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.8 * momentum + 0.2 * gradient
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(weight.detach(), expected)


@pytest.fixture(autouse=True)
def not_compiled():
    """Do not compile torchao's step: that takes twenty seconds and changes only the last bits."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_eight_bit_adamw_is_near_adamw():
    pytest.importorskip("torchao")
    model, reference, start = (tiny_model(**BYTES) for _ in range(3))
    optimizers = build_optimizers(model, params_with(optimizer="adamw8bit"))
    train_steps(model, optimizers, range(N_STEPS))
    kept = optimizer_tensors(model, optimizers)
    assert any(tensor.dtype == torch.uint8 for key, tensor in kept.items() if key.startswith("tok_emb.weight/"))
    train_steps(reference, build_optimizers(reference, PARAMS), range(N_STEPS))
    first, *ends = (torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (start, model, reference))
    assert torch.cosine_similarity(ends[0] - first, ends[1] - first, 0) > 0.9


@pytest.mark.parametrize("name", INSTALLED)
def test_state_survives_as_named_tensors(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    params = params_with(optimizer=name)
    model, other = tiny_model(**BYTES), tiny_model(**BYTES)
    optimizers, fresh = build_optimizers(model, params), build_optimizers(other, params)
    assert optimizer_tensors(model, optimizers) == {}
    train_steps(model, optimizers, range(2))
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(model, optimizers).items()}
    other.load_state_dict(model.state_dict())
    save_tensors(tmp_path / "optimizer.safetensors", optimizer_tensors(model, optimizers))
    load_optimizer_tensors(other, fresh, load_tensors(tmp_path / "optimizer.safetensors"))
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer_tensors(other, fresh), saved)
    for trained, some in ((model, optimizers), (other, fresh)):
        set_lr(some, 1.0)
        train_steps(trained, some, range(2, 4))
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("ends", [{}, {"tok_emb": "embedding", "lm_head": "head"}], ids=["blocks", "ends"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_adapters_alone_can_be_trained(name, ends):
    model = tiny_model(tie_weights=False)
    add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj", *ends], generator=None)
    optimizers = build_optimizers(model, params_with(optimizer=name))
    assert {group["kind"] for group in groups_of(optimizers).values()} == {"matrix", *ends.values()}
    before = {key: tensor.detach().clone() for key, tensor in trained_tensors(model).items()}
    train_steps(model, optimizers, range(2))
    assert all(not torch.equal(tensor, before[key]) for key, tensor in trained_tensors(model).items())


def test_every_optimizer_learns():
    for name in ("adamw", "muon", "lion"):
        model = tiny_model()
        ids = random_ids(4, 20)
        optimizers = build_optimizers(model, params_with(optimizer=name, lr=1e-3 if name == "lion" else 1e-2))
        first = next_token_loss(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:]).item()
        for _ in range(30):
            loss = next_token_loss(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert math.isfinite(loss.item())
        assert loss.item() < first - 1


def test_a_missing_package_is_reported_with_the_option_that_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"train.optimizer=adamw8bit needs torchao: pip install torchao, or use adamw"):
        build_optimizers(tiny_model(), params_with(optimizer="adamw8bit"))
