"""The model card and the Modelfile say what the stages wrote."""

import json
import shlex

import pytest
from conftest import tiny_config
from ruamel.yaml import YAML

from tinygpt.errors import UserError
from tinygpt.export.card import model_card, modelfile, read_origin
from tinygpt.report.details import Sample, prompt_to_try

PROMPT = 'It\'s "new" `id` $HOME'
ORIGIN = {
    "manifest": {"source": "python-docs", "licence": "PSF-2.0"},
    "training": {"init_from": "scratch", "lora": None, "max_steps": 1600, "betas": [0.9, 0.95]},
    "evaluation": {
        "split": "test",
        "tokens": 25013,
        "context": 128,
        "loss": 3.12086,
        "ppl": 22.6657,
        "bpb": 1.86304,
        "prompt": PROMPT,
    },
}


def test_the_card_has_data_params_and_metrics():
    card = model_card(tiny_config(), 1_066_112, ORIGIN, 64)
    _, front, text = card.split("---\n", 2)
    assert YAML(typ="safe").load(front)["pipeline_tag"] == "text-generation"
    for words in (
        "1,066,112 weights",
        "trained from scratch on",
        "python-docs (licence of the text: PSF-2.0)",
        "| loss | 3.1209 nats per token |",
        "| perplexity | 22.67 |",
        "| bits per byte | 1.8630 |",
        "a context of 64 tokens; trained",
        "| n_layer | 2 |",
        "| betas | [0.9, 0.95] |",
    ):
        assert words in text
    assert "None" not in text


def test_each_folders_card_shows_what_runs_there_and_the_context_of_its_files():
    folder, files = (model_card(tiny_config(window=8), 1_066_112, ORIGIN, 8, kind) for kind in (None, "q8_0"))
    for card in (folder, files):
        assert "a context of 8 tokens in this format (64 in tinygpt); trained" in card
        assert "| window | 8 |" in card
    assert "from transformers import pipeline" in folder and "library_name: transformers" in folder
    assert "gguf" not in folder and "ollama" not in folder
    assert "-m tinygpt-q8_0.gguf" in files and "ollama create" in files
    assert "transformers" not in files and "library_name" not in files


def test_the_card_of_gguf_files_names_that_of_the_adapters_if_there_is_one():
    origin = ORIGIN | {"training": ORIGIN["training"] | {"init_from": "base", "lora": {"rank": 2}}}
    named = [
        "tinygpt-lora.gguf" in model_card(tiny_config(), 1, made_by, 64, kind)
        for made_by, kind in ((origin, "f32"), (origin, None), (ORIGIN, "f32"))
    ]
    assert named == [True, False, False]
    for made_by, knows_more in ((origin, True), (ORIGIN, False)):
        card = model_card(tiny_config(), 1, made_by, 64, "f32")
        assert ("knows nothing else.\n\n| measured" in card) is not knows_more and "\n\n| measured" in card


def test_the_prompt_of_a_card_reaches_the_program_as_it_is():
    folder, files = (model_card(tiny_config(), 1_066_112, ORIGIN, 64, kind) for kind in (None, "q8_0"))
    llama, ollama = (shlex.split(line[2:]) for line in files.splitlines() if line.startswith("$ "))
    assert llama[llama.index("-p") + 1] == ollama[-1] == PROMPT
    assert f"({PROMPT!r})[0]" in folder


def test_the_prompt_to_try_is_a_line_of_a_held_out_text():
    def prompt(*samples):
        return prompt_to_try([Sample(text, "", [], [], followed) for text, followed in samples])

    assert prompt(("Return a new", None), ("\n  GREMIO:\nGood morrow", [])) == "GREMIO:"
    assert prompt(("", None), ("Return a new", None), ("...", [])) == "Return a new"
    assert prompt(("-p " + "words " * 20, [])) == "p " + "words " * 9 + "words"
    assert prompt(("a\x1b[2J", [])) == r"a\x1b[2J"
    assert prompt() == prompt(("", None)) == "The"


def test_the_modelfile_names_the_file_its_context_and_its_end(tiny_tokenizer):
    lines = modelfile(tiny_tokenizer, "q8_0", 128).splitlines()
    assert lines[:3] == ["FROM ./tinygpt-q8_0.gguf", 'TEMPLATE "{{ .Prompt }}"', "PARAMETER num_ctx 128"]
    assert lines[-1] == 'PARAMETER stop "<|endoftext|>"'


def test_what_is_missing_is_reported_with_its_stage(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(ORIGIN["manifest"]))
    with pytest.raises(UserError, match=r"training.json not found: run `dvc repro train`"):
        read_origin(tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("bpb", "1.8"), ("tokens", None), ("prompt", 3)])
def test_a_report_of_another_version_is_reported(key, value):
    others = {name: found for name, found in ORIGIN["evaluation"].items() if name != key}
    for evaluation in (others, others | {key: value}):
        with pytest.raises(
            UserError, match=r"reports/eval.json is damaged or from another version of tinygpt \(.*: run `dvc repro`"
        ):
            model_card(tiny_config(), 1_066_112, ORIGIN | {"evaluation": evaluation}, 64, "q8_0")
