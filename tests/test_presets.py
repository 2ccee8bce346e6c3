"""Presets: each fits params.yaml, and nothing but their values changes there."""

import shutil

import pytest
import torch
from project import ROOT, run, succeed
from ruamel.yaml import YAML

from tinygpt.cli.presets import apply_values
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import ParamsError, check_params, load_params

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
SIZES = {
    "toy": (4, 4, 256, 128),
    "tiny": (4, 4, 128, 128),
    "small": (8, 8, 512, 256),
    "medium": (12, 8, 512, 512),
    "large": (24, 12, 768, 1024),
    "gpt2": (12, 12, 768, 1024),
}


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_changes_its_values_and_no_other_line(preset, params):
    before = params.read_text().splitlines()
    values = YAML(typ="safe", pure=True).load(preset)
    changed = apply_values(params, values)
    check_params(params)
    after = params.read_text().splitlines()
    assert len(after) == len(before)
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(differing) == len(changed)
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in differing)  # comments stay
    found = YAML(typ="safe", pure=True).load(params)
    assert all(found[group][key] == value for group, keys in values.items() for key, value in keys.items())
    assert apply_values(params, values) == []
    assert params.read_text().splitlines() == after


def test_the_sizes_and_gpt2s_number_of_weights(params):
    assert {path.stem for path in PRESETS} == {*SIZES, "gpt2-style", "llama-style"}
    for name, sizes in SIZES.items():
        apply_values(params, YAML(typ="safe", pure=True).load(params.parent / f"presets/{name}.yaml"))
        model = load_params(ModelParams, path=params)
        assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == sizes
        if name == "gpt2":
            with torch.device("meta"):
                assert GPT(GPTConfig(**config_fields(model), vocab_size=50257)).n_params() == 124_439_808


def test_the_command_lists_applies_and_helps(params):
    listed = succeed("python -m tinygpt preset", params.parent, PYTHONPATH=str(ROOT))
    assert "toy" in listed and "124,439,808 weights" in listed
    said = succeed("python -m tinygpt preset small", params.parent, PYTHONPATH=str(ROOT))
    assert "model.n_layer: 4 -> 8" in said
    wrong = run("python -m tinygpt preset smal", params.parent, PYTHONPATH=str(ROOT))
    assert (wrong.returncode, wrong.stdout) == (1, "error: there is no preset smal (did you mean small?)\n")


def test_a_base_that_is_not_there_is_told(params):
    wrong = run("python -m tinygpt preset base", params.parent, PYTHONPATH=str(ROOT))
    assert wrong.stdout.startswith("error: data/base is empty: run `python -m tinygpt import-hf FOLDER`")


def test_a_preset_that_does_not_fit_leaves_params_as_they_are(params):
    before = params.read_bytes()
    with pytest.raises(ParamsError, match="must be a multiple of model.n_head=3"):
        apply_values(params, {"model": {"n_head": 3}})
    assert params.read_bytes() == before
    assert sorted(path.name for path in params.parent.iterdir()) == ["params.yaml", "presets"]
