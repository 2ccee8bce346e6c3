"""The check of exported files accepts right ones and refuses wrong ones."""

from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import prose, tiny_config
from gguf import GGUFReader
from test_gguf import GPT2, LLAMA, QWEN3, random_model

from tinygpt.errors import UserError
from tinygpt.export.config import GGUFType
from tinygpt.export.families import LLAMA_CPP
from tinygpt.export.gguf import export_gguf
from tinygpt.export.gguf_types import Q4, WEIGHT_TYPES, Type, WeightType, tolerance
from tinygpt.export.verify import check_gguf
from tinygpt.model.config import MLPS
from tinygpt.model.gpt import GPT
from tinygpt.report.perplexity import scored_nll
from tinygpt.tokenizer import Tokenizer


@pytest.fixture
def check(tmp_path, tiny_tokenizer):
    """Export one model, and check the file against another."""

    def run(model, *, exported=None, tokenizer=tiny_tokenizer, weight_type="f32"):
        path = tmp_path / "model.gguf"
        export_gguf(exported or model, tiny_tokenizer, path, weight_type)
        ids = np.array(tiny_tokenizer.encode(prose(500, seed=9))[:600], tiny_tokenizer.dtype)
        return check_gguf(model, tokenizer, path, weight_type, ids)

    return run


@pytest.fixture
def model(tiny_tokenizer):
    return random_model(**LLAMA, vocab_size=tiny_tokenizer.vocab_size, n_kv_head=2)


@pytest.mark.parametrize(
    ("family", "weight_type"),
    [
        *product([GPT2, LLAMA, QWEN3, LLAMA | {"window": 16}, GPT2 | {"window": 16}], ["f32", "q8_0"]),
        *product([GPT2, LLAMA], ["f16", "bf16", "q4_k_m", "q2_k"]),  # types depend on tensors, not on families
    ],
)
def test_a_right_file_passes(family, weight_type, check, tiny_tokenizer):
    model = random_model(**family, vocab_size=tiny_tokenizer.vocab_size)
    measures, failures = check(model, weight_type=weight_type)
    assert failures == []
    assert measures["wrong_tokens"] == 0
    assert measures["greedy_agreement"] > 0.9
    assert measures["ppl"] == pytest.approx(
        measures["ppl_pytorch"], rel={"q2_k": 0.1, "q4_k_m": 5e-2}.get(weight_type, 2e-2)
    )


def changed(model, name, change):
    """A copy of a model with one tensor changed."""
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.state_dict()[name].copy_(change(model.state_dict()[name]))
    return copy


def test_rows_not_permuted_for_the_rotation_fail(check, model, monkeypatch):
    families = [replace(f, layout=replace(f.layout, adjacent_rope=False)) for f in LLAMA_CPP.families]
    monkeypatch.setattr(LLAMA_CPP, "families", families)
    _, failures = check(model)
    assert any(failure.startswith("model.gguf: max_logprob_diff is ") for failure in failures)
    assert all(", the limit is " in failure for failure in failures)


def test_other_weights_fail(check, model):
    _, failures = check(model, exported=changed(model, "blocks.0.attn.q_proj.weight", lambda w: w + 1e-6))
    assert [failure.split()[1] for failure in failures] == ["max_weight_error"]


@pytest.mark.parametrize("weight_type", ["f32", "q8_0"])
def test_a_block_without_its_output_fails_in_every_type(weight_type, check, model):
    silent = changed(model, "blocks.1.mlp.down_proj.weight", torch.zeros_like)
    assert check(model, exported=silent, weight_type=weight_type)[1]


def test_another_theta_fails(check, model):
    other = GPT(replace(model.config, rope_theta=9000.0))
    other.load_state_dict(model.state_dict())
    assert check(model, exported=other)[1]


def test_a_tokenizer_with_another_merge_order_fails(check, model, tiny_tokenizer):
    other = Tokenizer(tiny_tokenizer.tokens, tiny_tokenizer.merges[::-1], tiny_tokenizer.special_tokens)
    _, failures = check(model, tokenizer=other)
    assert [failure.split()[1] for failure in failures] == ["wrong_tokens"]


@pytest.mark.parametrize("weight_type", ["f16", "q8_0", "q4_0"])
def test_weights_too_small_for_float16_do_not_fail(weight_type, check, model):
    small = changed(model, "blocks.1.mlp.down_proj.weight", lambda w: w * 1e-7)
    assert check(small, weight_type=weight_type)[1] == []


def test_weights_that_are_not_numbers_fail_to_load(check, model):
    with pytest.raises(UserError, match=r"cannot load .*invalid"):
        check(model, exported=changed(model, "blocks.1.mlp.down_proj.weight", lambda w: w * torch.nan))


def test_a_choice_between_equals_is_not_a_failure(check, tiny_tokenizer):
    flat = GPT(tiny_config(**LLAMA, vocab_size=tiny_tokenizer.vocab_size, block_size=64, tie_weights=False)).eval()
    with torch.no_grad():
        for block in flat.blocks:
            block.attn.o_proj.weight.normal_(std=0.01)
            block.mlp.down_proj.weight.normal_(std=0.01)
    measures, failures = check(flat, weight_type="q8_0")
    assert failures == []
    assert measures["greedy_agreement"] < 1
    assert 0 < measures["max_greedy_gap"] < 0.1


def test_perplexity_counts_the_second_half_of_a_chunk_as_llama_perplexity_does():
    logprobs = np.log(np.full((8, 10), 0.1, np.float32))
    ids = np.arange(8)
    logprobs[np.arange(7), ids[1:]] = -np.arange(7, dtype=np.float32)  # the target after position i gets -i
    assert scored_nll(logprobs, ids).tolist() == [4, 5, 6]


def test_there_is_a_tolerance_for_every_kind_of_mlp_and_weight_type():
    for mlp, weight_type in product(MLPS, get_args(GGUFType)):
        assert (tolerance(mlp, weight_type).weight == 0) == (weight_type == "f32")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("iq4_nl", WeightType(Type.IQ4_NL, Q4)),  # llama.cpp's kernel writes it
        ("mxfp4_moe", WeightType(Type.MXFP4, Q4)),  # the gguf package does
    ],
)
def test_a_weight_type_is_one_entry(name, entry, check, model, monkeypatch, tmp_path):
    monkeypatch.setitem(WEIGHT_TYPES, name, entry)
    measures, failures = check(model, weight_type=name)
    assert failures == []
    assert 0.01 < measures["max_weight_error"] < 0.16
    kinds = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "model.gguf").tensors if len(tensor.shape) == 2}
    assert kinds == {entry.base, Type.Q8_0}  # the head's rows of 64 are too short for q6_k
