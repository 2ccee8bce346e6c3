"""A model written with the other norm computes the same, here and in llama.cpp."""

import pytest
import torch
from conftest import tiny_config

from benchmarks.export_matrix import random_model
from tinygpt.errors import UserError
from tinygpt.export.family import find_family
from tinygpt.export.gguf_families import LLAMA_CPP
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.export.rewrite import rewrite_model, rewritten

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
CENTERED = {"norm": "layernorm", "window": 8}  # granite_swa honours a window, and is RMSNorm
DOUBLED = {"mlp": "gelu"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("changes", "family"),
    [
        (CENTERED, "granite_swa"),
        (CENTERED | {"bias": "qkv", "n_kv_head": 1, "full_every": 2}, "granite_swa"),
        ({"norm": "layernorm", "mlp": "relu2", "head_dim": 6}, "arcee"),
        (DOUBLED, "starcoder2"),
        (DOUBLED | {"bias": "all", "n_kv_head": 2}, "starcoder2"),
        (DOUBLED | {"parallel_block": True, "bias": "qkv", "n_kv_head": 1}, "phi2"),
        (DOUBLED | {"position": "learned"}, "gpt2"),
    ],
)
def test_it_computes_the_same_and_llama_cpp_knows_it(changes, family, tied):
    model = random_model(tiny_config(**changes, tie_weights=tied))
    assert find_family(LLAMA_CPP.families, model.config) in (None, (LLAMA_CPP.families[3], 8))  # 3: stablelm, no window
    made = rewrite_model(model, LLAMA_CPP)
    assert vars(made.config).items() >= vars(rewritten(model.config, LLAMA_CPP)).items()
    assert find_family(LLAMA_CPP.families, made.config)[0].name == family
    with torch.inference_mode():
        torch.testing.assert_close(made(IDS).log_softmax(-1), model(IDS).log_softmax(-1), atol=1e-5, rtol=0)


def test_a_known_model_and_one_that_stays_unknown_are_left_alone():
    for changes in ({}, {"norm": "layernorm"}, {"mlp": "gelu", "qk_norm": True}, {"mlp": "gelu", "head_dim": 6}):
        model = random_model(tiny_config(**changes))
        assert rewrite_model(model, LLAMA_CPP) is model
    arcee = random_model(tiny_config(**DOUBLED))
    assert rewrite_model(arcee, TRANSFORMERS) is arcee


def test_weights_too_large_to_lose_their_mean_are_told():
    model = random_model(tiny_config(**CENTERED))
    with torch.no_grad():
        model.tok_emb.weight += 1e4
    with pytest.raises(UserError, match=r"norm=rmsnorm differs by .* set export.rewrite=false"):
        rewrite_model(model, LLAMA_CPP)
