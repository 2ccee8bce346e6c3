"""Presets: each fits params.yaml, and nothing but their values changes there."""

import re
import shutil
from argparse import Namespace

import pytest
import torch
from project import ROOT, run, succeed
from ruamel.yaml import YAML

from tinygpt.cli.project import apply_values, preset
from tinygpt.errors import UserError
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import ParamsError, check_params, load_params

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
SIZES = {
    "toy": (4, 4, 256, 128),
    "tiny": (4, 4, 128, 128),
    "mini": (6, 8, 256, 256),
    "wide": (6, 8, 512, 1024),
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
    assert len(differing) >= len(changed)  # a list is several lines
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in differing)  # comments stay
    found = YAML(typ="safe", pure=True).load(params)
    assert all(found[group][key] == value for group, keys in values.items() for key, value in keys.items())
    assert apply_values(params, values) == []
    assert params.read_text().splitlines() == after


def test_the_sizes_and_gpt2s_number_of_weights(params):
    assert {path.stem for path in PRESETS} == {*SIZES, "gpt2-style", "llama-style", "shakespeare"}
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


def test_line_ends_of_windows_stay(params):
    before = params.read_text()
    params.write_bytes(before.replace("\n", "\r\n").encode())
    assert apply_values(params, {"model": {"n_layer": 3}})
    after = params.read_bytes().decode()
    assert after == re.sub("n_layer: 4", "n_layer: 3", before).replace("\n", "\r\n")


DAMAGED = {
    "empty": ("", r"params\.yaml must hold the groups download, clean"),
    "a list": ("- model", r"params\.yaml must hold the groups"),
    "flat": ("n_layer: 4\nmodel: 3\n", r"unknown key n_layer\n.*missing key download"),
    "misspelled": ("modle:", r"unknown key modle \(did you mean model\?\)"),
    "a key is missing": ("", r"missing key model\.n_layer"),
    "not YAML": ("a: [", r"params\.yaml is not valid YAML"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_params_file_is_told_by_name_and_left_alone(name, params):
    text, message = DAMAGED[name]
    if name == "misspelled":
        text = params.read_text().replace("model:\n", "modle:\n")
    if name == "a key is missing":
        text = re.sub("  n_layer: .*\n", "", params.read_text())
    params.write_text(text)
    with pytest.raises(UserError, match=message):
        apply_values(params, {"model": {"n_layer": 3}})
    assert params.read_text() == text


def test_a_damaged_preset_is_told_and_presets_are_listed(params, monkeypatch, capsys):
    before = params.read_bytes()
    for text in ("", "- a", "model: 3", "model: {n_leyer: 3}", "model: [", "modle: {n_layer: 3}"):
        (params.parent / "presets/toy.yaml").write_text(text)
        with pytest.raises(UserError, match=r"toy\.yaml|unknown key mod"):
            preset(Namespace(name="toy"))
        assert params.read_bytes() == before
    (params.parent / "presets/toy.yaml").write_bytes(b"# \x1b[2J\xff\n")
    preset(Namespace(name=None))
    assert "toy          \\x1b[2J\ufffd\n" in capsys.readouterr().out


ODD = [
    lambda text: text.replace(b"\n  n_layer", "\u0085  n_layer".encode()),  # a line end in YAML 1.1
    lambda text: text + b"...\n...\n",
    lambda text: text.decode().encode("utf-16"),
]


@pytest.mark.parametrize("change", ODD)
def test_a_file_that_dvc_would_read_otherwise_is_refused_and_left_alone(change, params):
    before = change(params.read_bytes())
    params.write_bytes(before)
    with pytest.raises(UserError, match=r"params.yaml is not (YAML as DVC reads it|valid YAML)"):
        apply_values(params, {"train": {"max_steps": 5}})
    assert params.read_bytes() == before
