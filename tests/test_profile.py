"""What a run will cost: by hand, and counted against the real thing."""

import dataclasses

import pytest
import torch
from conftest import random_ids, tiny_config
from project import ROOT, run, set_params, succeed
from test_presets import params  # noqa: F401  a folder with params.yaml
from test_train import PARAMS

from tinygpt.model import GPT
from tinygpt.train.config import EMAParams, LoRAParams
from tinygpt.train.loss import next_token_loss
from tinygpt.train.optim import build_optimizers, optimizer_tensors
from tinygpt.train.profile import (
    build_trained,
    flops_per_token,
    memory_of,
    peak_flops,
    tokens_per_second,
    weights_by_part,
)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False, "position": "learned", "bias": "all", "qk_norm": True}])
def test_parts_are_all_the_weights(changes):
    model = GPT(tiny_config(**changes))
    assert sum(weights_by_part(model).values()) == model.n_params()
    assert weights_by_part(model)["embedding"] == 300 * 32


def test_operations_by_hand():
    config = tiny_config(n_layer=2, n_head=4, n_embd=32, n_hidden=64, block_size=64, vocab_size=300, n_kv_head=2)
    matrices = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 300
    attention = 2 * 2 * 2 * 32 * 32.5  # a token sees 32.5 tokens on average
    assert flops_per_token(config) == 3 * (2 * matrices + attention)
    windowed = tiny_config(n_layer=2, n_embd=32, n_hidden=64, block_size=64, n_kv_head=2, window=2, full_every=2)
    seen = (32.5 + (1 + 63 * 2) / 64) / 2
    assert flops_per_token(windowed) == 3 * (2 * matrices + attention / 32.5 * seen)


def kept_by_a_step(model) -> int:
    """Bytes that a real forward pass of four sequences keeps for the backward pass."""
    ids, kept = random_ids(4, 65), {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    assert loss.isfinite()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "norm": "layernorm", "position": "learned"}, {"window": 8}])
def test_activations_counted_without_computing_are_those_of_a_real_step(changes):
    model = GPT(tiny_config(**changes))
    memory = memory_of(model.config, PARAMS, 4, torch.device("cpu"))
    assert memory.activations == pytest.approx(kept_by_a_step(model), rel=0.01)
    assert memory.weights == memory.gradients == memory.optimizer / 2 == 4 * model.n_params()
    assert memory.kv_cache == 2 * 4 * 2 * 4 * 8 * 64


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_of_adapters_alone_are_gradients_and_optimizer_state_counted(dropout):
    lora = LoRAParams(rank=2, alpha=4.0, dropout=dropout, targets=("q_proj", "down_proj"))
    model = build_trained(tiny_config(), lora)
    n_adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = dataclasses.replace(PARAMS, init_from="base", lora=lora)
    memory = memory_of(model.config, adapted, 4, torch.device("cpu"))
    assert n_adapters == 2 * 2 * (32 + 32 + 96 + 32)
    assert memory.gradients == memory.optimizer / 2 == 4 * n_adapters
    assert memory.weights == 4 * model.n_params() == 4 * (GPT(model.config).n_params() + n_adapters)
    assert memory.activations == pytest.approx(kept_by_a_step(model), rel=0.01)
    frozen = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 32 * 300
    attention = 2 * 2 * 2 * 32 * 32.5
    assert flops_per_token(model.config, lora) == 2 * (2 * frozen + 3 * n_adapters) + 3 * attention


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("ema", [None, EMAParams(decay=0.9, start=0)])
def test_the_state_that_is_counted_is_what_a_step_leaves(optimizer, ema):
    train = dataclasses.replace(PARAMS, optimizer=optimizer, ema=ema)
    model = GPT(tiny_config(tie_weights=False))
    optimizers = build_optimizers(model, train)
    next_token_loss(model(random_ids(2, 9)), random_ids(2, 9)).backward()
    for each in optimizers:
        each.step()
    steps = 4 * len(list(model.parameters()))  # AdamW counts them
    state = sum(tensor.nbytes for tensor in optimizer_tensors(model, optimizers).values())
    average = 4 * model.n_params() if ema else 0
    counted = memory_of(model.config, train, 4, torch.device("cpu")).optimizer
    assert state + average - steps <= counted <= state + average


def test_speeds_are_measured():
    assert tokens_per_second(tiny_config(), PARAMS, torch.device("cpu"), 2) > 100
    assert peak_flops(torch.device("cpu")) > 1e9


def test_the_command_tells_the_costs_and_warns_of_a_run_that_will_not_fit(params):  # noqa: F811
    folder = params.parent
    said = succeed("python -m tinygpt profile", folder, PYTHONPATH=str(ROOT))
    for words in ("weights     1,066,368: embedding 131,072", "operations", "training", "generation", "MFU"):
        assert words in said
    assert "profile: measures at least two training steps of 1,024 tokens, which --no-measure leaves out" in said
    assert f" in {1600 * 8 * 128:,} tokens" in said
    lora = {"rank": 8, "alpha": 16, "dropout": 0, "targets": ["q_proj", "v_proj"]}
    set_params(folder, {"train.init_from": "base", "train.lora": lora})
    set_params(folder, {"train.batch_warmup": {"start": 2, "steps": 400}})
    said = succeed("python -m tinygpt profile --no-measure", folder, PYTHONPATH=str(ROOT))
    assert "adapters    16,384 weights, which alone are trained" in said
    assert "measures" not in said
    assert f" in {(200 * 2 + 200 * 4 + 1200 * 8) * 128:,} tokens" in said
    set_params(folder, {"train.init_from": "scratch", "train.lora": None})
    set_params(folder, {"model.n_embd": 16384, "model.n_layer": 400})
    said = run("python -m tinygpt profile", folder, PYTHONPATH=str(ROOT))
    assert said.returncode == 1
    assert "error: the run will not fit: lower runtime.micro_batch_size" in said.stdout
