"""The lean forward pass gives the model's logits, for every switch, kind of weights and number of rows."""

import pytest
import torch
from conftest import FAMILIES, random_ids, tiny_model
from torch import nn

from tinygpt.generate.decoder import Decoder
from tinygpt.generate.lean import FastProduct, product, products
from tinygpt.model.lora import add_lora
from tinygpt.model.quantize import QUANTIZED, quantize

SWITCHES = {
    **FAMILIES,
    "learned": {"position": "learned"},
    "layernorm": {"norm": "layernorm"},
    "layernorm with bias": {"norm": "layernorm", "bias": "all"},
    "rmsnorm with biases": {"bias": "all"},
    "bias of qkv": {"bias": "qkv"},
    "gelu": {"mlp": "gelu"},
    "relu2": {"mlp": "relu2", "bias": "all"},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "qk_norm of layernorm": {"qk_norm": True, "norm": "layernorm", "n_kv_head": 2},
    "parallel": {"parallel_block": True},
    "parallel, one layer": {"parallel_block": True, "n_layer": 1},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "some windows": {"window": 7, "full_every": 2, "n_layer": 4, "n_kv_head": 1},
    "full layers alone at the end": {"window": 7, "full_every": 3, "n_layer": 3},
    "own head": {"tie_weights": False},
    "wide heads": {"head_dim": 24},
    "other theta and eps": {"rope_theta": 500.0, "norm_eps": 1e-2},
    "odd sizes": {"n_embd": 33, "n_head": 3, "head_dim": 10, "n_hidden": 37, "vocab_size": 301},
}


def assert_says_the_same(model, rows: list[list[int]], *, n_step: int = 9) -> None:
    """A decoder and the model without a cache have the same logits after the prompts, and after each of n_step ids."""
    decoder = Decoder(model, rows)
    for step in range(n_step):
        with torch.inference_mode():
            expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
        torch.testing.assert_close(decoder.logits, expected, atol=2e-5, rtol=2e-5)
        added = [(17 * step + 31 * i) % 300 for i in range(len(rows))]
        decoder.step(added)
        rows = [[*row, i] for row, i in zip(rows, added, strict=True)]


@pytest.fixture(params=[1, 2])
def n_thread(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_lean_logits_equal_the_models_for_every_switch_and_any_rows(changes):
    model = tiny_model(**changes)
    assert_says_the_same(model, [[3]])
    assert_says_the_same(model, random_ids(3, 9).tolist())
    assert_says_the_same(model, [[5, 7, 11], [1], random_ids(40).tolist(), [2, 8, 1, 1, 8, 2, 3]])


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_lean_logits_equal_the_models_with_quantized_weights(kind, bias):
    model = tiny_model(n_embd=64, vocab_size=304, bias=bias, norm="layernorm")
    quantize(model, kind)
    rows = [[5, 7, 11], [1], [2, 8, 1, 1]]
    decoder = Decoder(model, rows)
    decoder.step([4, 5, 6])
    with torch.inference_mode():
        expected = [model(torch.tensor([[*row, i]]))[0, -1] for row, i in zip(rows, (4, 5, 6), strict=True)]
    spread = torch.stack(expected).std()
    torch.testing.assert_close(decoder.logits, torch.stack(expected), atol=0.06 * float(spread), rtol=0)  # bfloat16


@pytest.mark.parametrize("targets", [{"q_proj", "up_proj", "o_proj"}, None])
def test_lean_logits_equal_the_models_with_unmerged_adapters(targets):
    model = tiny_model(tie_weights=False)
    generator = torch.Generator().manual_seed(0)
    add_lora(model, rank=4, alpha=8, dropout=0.5, targets=targets, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight") or name == "tok_emb.lora_A.weight":
            nn.init.normal_(parameter, std=0.1, generator=generator)
    assert_says_the_same(model.eval(), [[3, 4], [5]])


def test_weights_that_change_are_seen_by_the_next_decoder():
    model = tiny_model(bias="all", norm="layernorm")
    assert_says_the_same(model, [[3, 4]], n_step=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(random_ids(1, 8)).square().mean().backward()
    optimizer.step()
    assert_says_the_same(model, [[3, 4]], n_step=2)
    model.load_state_dict(tiny_model(bias="all", norm="layernorm", seed=1).state_dict())
    assert_says_the_same(model, [[3, 4]], n_step=2)


def test_the_layers_of_a_model_are_multiplied_the_fast_way():
    model = tiny_model(bias="all")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 2 * 7 + 1
    assert all(isinstance(product(layer), FastProduct) for layer in layers)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(48,), (48, 16), (5, 7, 3)])
def test_lean_products_work_for_any_number_of_rows(sizes, bias, n_thread):
    torch.manual_seed(0)
    layers = [nn.Linear(24, size, bias=bias) for size in sizes]
    multiply = products(*layers)
    with torch.inference_mode():
        for m in (1, 2, 5, 40):
            x = torch.randn(m, 24)
            expected = torch.cat([layer(x) for layer in layers], -1)
            torch.testing.assert_close(torch.cat(list(multiply(x)), -1), expected)
            strided = x.mT.contiguous().mT
            torch.testing.assert_close(torch.cat(list(multiply(strided)), -1), expected)
