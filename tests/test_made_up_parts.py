"""An MLP or a norm known only to its registry trains, writes text, and is refused by the export in one line."""

import pytest
import torch
from conftest import random_ids, tiny_config, tiny_model
from torch import nn

from tinygpt.errors import UserError
from tinygpt.export.config import ExportParams
from tinygpt.generate import Sampling, generate
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.decoder import Decoder
from tinygpt.model.config import MLPS, MLPKind
from tinygpt.model.gpt import GPT
from tinygpt.model.layers import ACTIVATIONS, MLP, NORMS
from tinygpt.params import require


class LargestNorm(nn.Module):
    """A norm that divides by the largest absolute value."""

    def __init__(self, size, *, eps, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x / (x.abs().amax(-1, keepdim=True) + 0.01) * self.weight


class ShiftedNorm(nn.LayerNorm):
    """A subclass of a norm that decoding knows, with another result."""

    def forward(self, x):
        return super().forward(x) + 0.5


PARTS = {
    "ungated MLP": {"mlp": "tanh"},
    "gated MLP": {"mlp": "tanhglu", "bias": "all"},
    "norm": {"norm": "largest", "qk_norm": True, "n_kv_head": 2},
    "norm of a known class": {"norm": "shifted", "qk_norm": True, "parallel_block": True},
    "norm without weights": {"norm": "weightless", "qk_norm": True},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "tanh", torch.tanh)
    monkeypatch.setitem(MLPS, "tanh", MLPKind("tanh", gated=False))
    monkeypatch.setitem(MLPS, "tanhglu", MLPKind("tanh", gated=True))
    monkeypatch.setitem(NORMS, "largest", LargestNorm)
    monkeypatch.setitem(NORMS, "shifted", lambda size, eps, bias: ShiftedNorm(size, bias=bias))
    monkeypatch.setitem(NORMS, "weightless", lambda size, eps, bias: nn.LayerNorm(size, elementwise_affine=False))


def assert_decodes_as_the_model(model, ids, tolerance=2e-5):
    """One row and several have the model's logits, with the last five tokens decoded step by step."""
    with torch.inference_mode():
        expected = model(ids)
    for n_row in (1, len(ids)):
        decoder = Decoder(model, ids[:n_row, :-5].tolist())
        for place in range(ids.size(1) - 5, ids.size(1)):
            decoder.step(ids[:n_row, place].tolist())
            torch.testing.assert_close(decoder.logits, expected[:n_row, place], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("changes", PARTS.values(), ids=PARTS)
def test_a_made_up_part_learns_and_writes(changes, tiny_tokenizer):
    model, ids = GPT(tiny_config(**changes), generator=torch.Generator().manual_seed(0)), random_ids(4, 33)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_decodes_as_the_model(model.eval(), ids)
    assert_decodes_as_the_model(tiny_model(**changes), ids)
    greedy = Sampling(temperature=0, ignore_eos=True)
    assert generate(model, tiny_tokenizer, "the", max_new_tokens=5, sampling=greedy)


def test_made_up_parts_are_compiled_too():
    model = tiny_model(n_layer=1, block_size=32, mlp="tanhglu", norm="largest", qk_norm=True)
    compile_step(model)
    assert_decodes_as_the_model(model, random_ids(1, 20))


@pytest.mark.parametrize("changes", PARTS.values(), ids=PARTS)
def test_the_export_of_a_made_up_part_is_refused_in_one_line(changes):
    export = ExportParams(hf=True, gguf=("f32",), check_tokens=512)
    with pytest.raises(UserError, match=r"transformers and llama\.cpp have no model with .*: set model\.") as caught:
        require(*export.rules_with({"model": tiny_config(**changes)}))
    assert "\n" not in str(caught.value)


def test_a_gated_mlp_has_a_third_matrix_and_as_many_weights():
    assert tiny_config(mlp="tanh").n_hidden == 128
    assert tiny_config(mlp="tanhglu").n_hidden == 96
    names = [name for name, _ in tiny_model(mlp="tanhglu").blocks[0].mlp.named_parameters()]
    assert names == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


def test_a_subclass_that_computes_something_else_is_called_itself():
    class DoubledMLP(MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class DoubledLinear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model(mlp="gelu")
    block = model.blocks[0]
    block.mlp.__class__, block.attn.q_proj.__class__ = DoubledMLP, DoubledLinear
    assert_decodes_as_the_model(model, random_ids(2, 20))
