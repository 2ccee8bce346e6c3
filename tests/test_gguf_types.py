"""Types of GGUF tensors: llama.cpp's rules on examples, and its quantized weights read back."""

import typing
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import tiny_config
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from test_gguf import IDS, LLAMA, byte_tokenizer, logprobs, random_model

from tinygpt.export.config import GGUFType
from tinygpt.export.gguf import export_gguf, read_gguf
from tinygpt.export.gguf_types import FALLBACKS, WEIGHT_TYPES, bits_per_weight, quantized, tensor_types, tolerance
from tinygpt.export.llamacpp import LlamaCpp

TYPES = typing.get_args(GGUFType)


def shapes(n_layer: int, width: int = 256, *, fused: bool = False, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The matrices of a model, and some vectors."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (300, width), "position_embd.weight": (64, width)}
    for i in range(n_layer):
        for name in ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]:
            found[f"blk.{i}.{name}.weight"] = (width, width)
        for name in ("attn_output", "ffn_up", "ffn_down"):
            found[f"blk.{i}.{name}.weight"] = (width, width)
        found |= {f"blk.{i}.attn_norm.weight": (width,), f"blk.{i}.attn_q_norm.weight": (4, 64)}
        found |= {f"blk.{i}.attn_output.bias": (width,)}
    return found | ({} if tied else {"output.weight": (300, width)})


def types(n_layer: int, weight_type: GGUFType, **kwargs: typing.Any) -> dict[str, str]:
    config = tiny_config(n_layer=n_layer, n_head=4, n_kv_head=kwargs.pop("n_kv_head", 4))
    return {name: kind.name for name, kind in tensor_types(shapes(n_layer, **kwargs), config, weight_type).items()}


def test_there_is_an_entry_for_every_type_and_vectors_stay_float32():
    assert set(WEIGHT_TYPES) == set(TYPES)
    for weight_type in TYPES:
        found = types(2, weight_type)
        small = [name for name in found if name.endswith(("norm.weight", "bias")) or name.startswith("position")]
        assert len(small) == 7
        assert {found[name] for name in small} == {"F32"}


def test_the_medium_mixes_give_the_first_the_last_and_every_third_layer_more_bits():
    # src/llama-quant.cpp: i < n/8, i >= 7n/8, or (i - n/8) % 3 == 2; of 16 layers these:
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    for weight_type, base in (("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")):
        found = types(16, weight_type)
        for name in ("attn_v", "ffn_down"):
            kinds = [found[f"blk.{i}.{name}.weight"] for i in range(16)]
            assert kinds == ["Q6_K" if i in more else base for i in range(16)]
        assert {found[f"blk.{i}.{name}.weight"] for i in range(16) for name in ("attn_q", "ffn_up")} == {base}
        assert found["token_embd.weight"] == base
        assert types(16, weight_type, fused=True)["blk.4.attn_qkv.weight"] == "Q6_K"


@pytest.mark.parametrize(("n_layer", "more"), [(4, [2, 3]), (10, [0, 3, 6, 8, 9]), (12, [0, 3, 6, 9, 10, 11])])
def test_the_medium_mixes_of_layers_that_eight_does_not_divide(n_layer, more):
    found = types(n_layer, "q4_k_m")
    assert [i for i in range(n_layer) if found[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == more


def test_the_other_mixes():
    found = types(16, "q4_k_s")
    assert [found[f"blk.{i}.attn_v.weight"] for i in range(6)] == ["Q5_K"] * 4 + ["Q4_K"] * 2
    assert [found[f"blk.{i}.ffn_down.weight"] for i in range(4)] == ["Q5_K"] * 2 + ["Q4_K"] * 2
    found = types(16, "q3_k_m")
    assert [found[f"blk.{i}.attn_v.weight"] for i in range(3)] == ["Q5_K"] * 2 + ["Q4_K"]
    assert [found[f"blk.{i}.ffn_down.weight"] for i in range(2)] == ["Q5_K", "Q4_K"]
    assert found["blk.3.attn_output.weight"] == "Q4_K"
    assert found["blk.3.ffn_up.weight"] == "Q3_K"
    found = types(2, "q3_k_l")
    assert {found[f"blk.1.{name}.weight"] for name in ("attn_v", "ffn_down", "attn_output")} == {"Q5_K"}
    assert set(types(2, "q3_k_s").values()) == {"Q3_K", "Q6_K", "F32"}
    assert types(2, "q2_k")["blk.0.attn_v.weight"] == "Q3_K"
    assert types(2, "q2_k", n_kv_head=1)["blk.0.attn_v.weight"] == "Q4_K"
    assert types(2, "q2_k")["blk.0.ffn_up.weight"] == "Q2_K"


def test_the_head_has_more_bits_also_where_it_is_the_embedding():
    for weight_type in ("q2_k", "q4_0", "q4_k_m", "q5_1", "q6_k"):
        assert types(1, weight_type)["output.weight"] == types(1, weight_type, tied=True)["token_embd.weight"] == "Q6_K"
        assert types(1, weight_type, width=96)["output.weight"] == "Q8_0"
    assert types(1, "q8_0")["output.weight"] == "Q8_0"
    assert types(1, "f16")["output.weight"] == "F16"


@pytest.mark.parametrize(
    ("weight_type", "at_96", "at_40"),
    [
        ("q2_k", "Q4_0", "F16"),
        ("q3_k_s", "Q4_0", "F16"),
        ("q4_k_s", "Q5_0", "F16"),
        ("q5_k_s", "Q5_1", "F16"),
        ("q6_k", "Q8_0", "F16"),
        ("q4_0", "Q4_0", "F16"),
        ("q8_0", "Q8_0", "F16"),
        ("bf16", "BF16", "BF16"),
    ],
)
def test_rows_that_do_not_fill_the_blocks_get_another_type(weight_type, at_96, at_40):
    assert types(8, weight_type, width=96)["blk.7.ffn_up.weight"] == at_96
    assert types(8, weight_type, width=40)["blk.7.ffn_up.weight"] == at_40


@pytest.mark.parametrize("kind", [*FALLBACKS, Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0])
def test_quantized_weights_are_near_the_weights(kind):
    weights = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    back = dequantize(quantized(weights, kind), kind)
    error = np.linalg.norm(back - weights) / np.linalg.norm(weights)
    limit = next(entry.tolerance.weight for entry in WEIGHT_TYPES.values() if entry.base == kind)
    assert limit / 4 < error < limit * 0.7
    assert np.array_equal(quantized(weights, kind)[3], quantized(weights[3:4], kind)[0])  # row by row


def test_bits_per_weight():
    sizes = {"a": (4, 256), "b": (256,)}
    assert bits_per_weight(sizes, {"a": Type.Q4_K, "b": Type.F32}) == (1024 * 4.5 + 256 * 32) / 1280


@pytest.mark.parametrize("n_embd", [64, 256])
@pytest.mark.parametrize("weight_type", ["q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_computes_what_the_weights_in_the_file_give(weight_type, n_embd, tmp_path):
    model = random_model(**LLAMA, vocab_size=257, n_embd=n_embd, n_hidden=2 * n_embd, n_kv_head=2)
    made = export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", weight_type)
    written = read_gguf(tmp_path / "m.gguf", model.config)
    with LlamaCpp(tmp_path / "m.gguf") as llama, torch.inference_mode():
        theirs = logprobs(llama.logits(IDS.tolist()))
        ours = logprobs(written(torch.from_numpy(IDS)[None])[0])
    assert np.abs(theirs - ours).max() < tolerance("swiglu", weight_type).logprob
    assert np.sqrt(np.square(theirs - ours).mean()) < 0.2
    expected = {"q6": 6.6, "q5": 6.1, "q4": 5.5, "q3": 4.5, "q2": 3.5} if n_embd == 256 else {}
    assert made.bits_per_weight < expected.get(weight_type[:2], 10)
    assert Counter(made.types.values())["f32"] == 5
