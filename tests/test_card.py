"""The model card and the Modelfile say what the stages wrote."""

import json

import pytest
from conftest import tiny_config
from ruamel.yaml import YAML

from tinygpt.errors import UserError
from tinygpt.export.card import Origin, model_card, modelfile, read_origin

ORIGIN = Origin(
    manifest={"source": "python-docs", "licence": "PSF-2.0"},
    training={"init_from": "scratch", "max_steps": 1600, "betas": [0.9, 0.95]},
    evaluation={"split": "test", "tokens": 25013, "context": 128, "loss": 3.12086, "ppl": 22.6657, "bpb": 1.86304},
)


def test_the_card_has_data_params_and_metrics():
    card = model_card(tiny_config(), 1_066_112, ORIGIN, "q8_0")
    _, front, text = card.split("---\n", 2)
    assert YAML(typ="safe").load(front)["pipeline_tag"] == "text-generation"
    for words in (
        "1,066,112 weights",
        "trained from scratch on",
        "python-docs (licence of the text: PSF-2.0)",
        "| loss | 3.1209 nats per token |",
        "| perplexity | 22.67 |",
        "| bits per byte | 1.8630 |",
        "tinygpt-q8_0.gguf",
        "| n_layer | 2 |",
        "| betas | [0.9, 0.95] |",
    ):
        assert words in text
    assert "None" not in text


def test_the_modelfile_names_the_file_its_context_and_its_end(tiny_tokenizer):
    lines = modelfile(tiny_tokenizer, "q8_0", 128).splitlines()
    assert lines[:3] == ["FROM ./tinygpt-q8_0.gguf", 'TEMPLATE "{{ .Prompt }}"', "PARAMETER num_ctx 128"]
    assert lines[-1] == 'PARAMETER stop "<|endoftext|>"'


def test_what_is_missing_is_told_with_its_stage(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(ORIGIN.manifest))
    with pytest.raises(UserError, match=r"training.json not found: run `dvc repro train`"):
        read_origin(tmp_path, tmp_path, tmp_path)
