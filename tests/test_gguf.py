"""GGUF files: their content, and the same results in llama.cpp."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_config
from gguf import GGUFReader

from tinygpt.errors import UserError
from tinygpt.export.gguf import export_gguf, read_gguf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.model.gpt import GPT
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR

GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False}
QWEN3 = LLAMA | {"qk_norm": True}
STABLELM = QWEN3 | {"norm": "layernorm", "parallel_block": True}
IDS = np.random.default_rng(0).integers(0, 256, 48)


def random_model(**changes):
    """A model whose every weight matters: norms and biases are random too, and the logits are spread."""
    torch.manual_seed(0)
    model = GPT(
        tiny_config(
            **{"n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64, "n_hidden": 96, "block_size": 64} | changes
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def byte_tokenizer():
    return Tokenizer([*BYTE_TO_CHAR, "<|endoftext|>"], [], {"<|endoftext|>": 256})


def logprobs(logits):
    return torch.as_tensor(logits).log_softmax(-1).numpy()


@pytest.mark.parametrize("family", [LLAMA, QWEN3, GPT2, LLAMA | {"window": 16}, GPT2 | {"window": 16}, STABLELM])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_reads_back_as_the_model(family, tied, tmp_path):
    model = random_model(**family, n_kv_head=2, tie_weights=tied, vocab_size=257)
    made = export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "f32")
    back = read_gguf(tmp_path / "m.gguf", model.config)
    ids = torch.from_numpy(IDS)[None, : made.n_ctx]
    assert torch.equal(back(ids), model(ids))
    short = "window" in family and family["position"] == "learned"
    assert back.config.block_size == made.n_ctx == (16 if short else 64)


def test_every_key_that_llama_cpp_would_guess_is_written(tmp_path, tiny_tokenizer):
    config = {"n_kv_head": 2, "rope_theta": 5000.0, "vocab_size": tiny_tokenizer.vocab_size}
    export_gguf(random_model(**LLAMA, **config), tiny_tokenizer, tmp_path / "m.gguf", "f32")
    found = {key: field.contents() for key, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["llama.rope.freq_base"] == 5000
    assert found["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"] == tiny_tokenizer.tokens
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tiny_tokenizer.merges]
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == tiny_tokenizer.eos_id
    assert found["tokenizer.ggml.add_bos_token"] is False
    special = [id for id, kind in enumerate(found["tokenizer.ggml.token_type"]) if kind == 3]
    assert special == sorted(tiny_tokenizer.special_tokens.values())


@pytest.mark.parametrize("weight_type", ["f32", "f16", "bf16", "q8_0"])
def test_the_same_model_gives_the_same_bytes(weight_type, tmp_path):
    model = random_model(**LLAMA, vocab_size=257)
    for name in "ab":
        export_gguf(model, byte_tokenizer(), tmp_path / name, weight_type)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_smaller_types_keep_vectors_and_positions_in_float32(tmp_path):
    model = random_model(**GPT2, bias="all", vocab_size=257)
    types = export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q8_0").types
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items()} == types
    for name, kind in types.items():
        small = len(tensors[name].shape) == 1 or name == "position_embd.weight"
        assert kind == ("f32" if small else "q8_0")


def test_rows_that_do_not_fill_blocks_become_float16_and_are_named(tmp_path):
    model = random_model(**LLAMA, n_hidden=50, vocab_size=257)
    types = export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q8_0").types
    assert {name for name, kind in types.items() if kind == "f16"} == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        theirs = logprobs(llama.logits(IDS.tolist()))
    assert np.abs(theirs - logprobs(model(torch.from_numpy(IDS)[None])[0].detach())).max() < 1


@pytest.mark.parametrize("weight_type", ["f16", "bf16", "q8_0"])
def test_each_type_is_nearer_to_the_weights_than_the_smaller_one_after_it(weight_type, tmp_path):
    order = ["f32", "f16", "bf16", "q8_0"]
    model = random_model(**LLAMA, vocab_size=257)
    ours, errors = logprobs(model(torch.from_numpy(IDS)[None])[0].detach()), []
    for name in order[: order.index(weight_type) + 1]:
        export_gguf(model, byte_tokenizer(), tmp_path / name, name)
        with LlamaCpp(tmp_path / name) as llama:
            errors.append(np.abs(logprobs(llama.logits(IDS.tolist())) - ours).max())
    assert all(first < second for first, second in pairwise(errors))


def test_a_model_of_no_family_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match=r"llama.cpp has .*: set model\.mlp=gelu, or model\.position=rope, or"):
        export_gguf(
            random_model(**GPT2 | {"mlp": "swiglu"}, vocab_size=257), byte_tokenizer(), tmp_path / "m.gguf", "f32"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weight_type", ["f16", "q8_0", "q4_k_m"])
def test_weights_beyond_float16_are_refused(weight_type, tmp_path):
    model = random_model(**LLAMA, vocab_size=257, n_embd=256)
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight.mul_(1e9)
    with pytest.raises(UserError, match=rf"blk\.0\.ffn_up\.weight .*float16.* {weight_type} from export\.gguf"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", weight_type)
    assert not list(tmp_path.iterdir())
