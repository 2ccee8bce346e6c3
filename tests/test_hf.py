"""The folder for transformers works there: offline, without remote code."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_gguf import GPT2, IDS, LLAMA, QWEN3, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinygpt.export.hf import export_hf
from tinygpt.export.verify import SAMPLES


@pytest.fixture
def export(tmp_path, tiny_tokenizer):
    """Export a random model with these switches; returns the model and the folder."""

    def run(**changes):
        model = random_model(vocab_size=tiny_tokenizer.vocab_size, **changes)
        tiny_tokenizer.save(tmp_path)
        export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
        return model, tmp_path / "hf"

    return run


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_left_out(tied, export):
    _, folder = export(**LLAMA, tie_weights=tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32


@pytest.mark.parametrize("family", [GPT2, LLAMA, QWEN3])
def test_transformers_reads_the_same_tokens(family, export, tiny_tokenizer):
    _, folder = export(**family)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        text = text.replace("<|endoftext|>", "")  # a special token for transformers, text for us
        assert theirs.encode(text) == tiny_tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tiny_tokenizer.eos_id
    assert (folder / "tokenizer.json").read_bytes() == (folder.parent / "tokenizer.json").read_bytes()


def test_transformers_generates_and_stops_by_the_same_settings(export, tiny_tokenizer):
    model, folder = export(**LLAMA, n_kv_head=2)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    config = loaded.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (tiny_tokenizer.eos_id,) * 2 + (None,)
    ids = torch.from_numpy(IDS[:8])[None]
    theirs = loaded.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for n in range(8, 16):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(ids, theirs[:, : n + 1])


def test_the_same_model_gives_the_same_bytes(export):
    _, folder = export(**GPT2, bias="all")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    export(**GPT2, bias="all")
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "generation_config.json" in first


def test_settings_with_different_defaults_are_written_out(export):
    _, folder = export(**QWEN3, rope_theta=5000.0)
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 16
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000
    assert {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"} <= config.keys()
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
