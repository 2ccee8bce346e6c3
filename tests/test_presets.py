"""Presets: each fits params.yaml, and changes nothing there but its values."""

import dataclasses
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from project import ROOT
from ruamel.yaml import YAML

from tinygpt.cli.project import apply_values, preset
from tinygpt.errors import UserError
from tinygpt.export.folders import write_base
from tinygpt.files import write_json
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import model_tensors
from tinygpt.params import ParamsError, check_params, load_params, read_groups
from tinygpt.paths import TOKENS
from tinygpt.tokens import SplitMeta, TokensMeta
from tinygpt.train.config import TrainParams
from tinygpt.yaml12 import load_yaml

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
SIZES = {
    "toy": (4, 4, 256, 256),
    "tiny": (4, 4, 128, 256),
    "mini": (6, 8, 256, 256),
    "wide": (6, 8, 512, 1024),
    "small": (8, 8, 512, 256),
    "medium": (12, 8, 512, 512),
    "large": (24, 12, 768, 1024),
    "gpt2": (12, 12, 768, 1024),
}

UNSIZED = ["base", "gpt2-style", "llama-style", "lora"]


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    return tmp_path / "params.yaml"


def comments(lines: list[str]) -> list[str]:
    return [comment for line in lines if (comment := line.partition("#")[2])]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_changes_its_values_and_no_other_line(preset, params):
    before = params.read_text().splitlines()
    values = YAML(typ="safe", pure=True).load(preset)
    changed = apply_values(params, values)
    check_params(params)
    after = params.read_text().splitlines()
    assert (len(after) == len(before)) is (preset.stem != "lora")  # lora adds lines for its adapters
    assert len([line for line in after if line not in before]) >= len(changed)  # a list is several lines
    assert comments(after) == comments(before)
    found = YAML(typ="safe", pure=True).load(params)
    assert all(found[group][key] == value for group, keys in values.items() for key, value in keys.items())
    assert apply_values(params, values) == []
    assert params.read_text().splitlines() == after


def test_the_sizes_and_gpt2s_number_of_weights(params):
    assert {path.stem for path in PRESETS} == {*SIZES, *UNSIZED, "shakespeare", "shakespeare-best"}
    for name, sizes in SIZES.items():
        apply_values(params, YAML(typ="safe", pure=True).load(params.parent / f"presets/{name}.yaml"))
        model = load_params(ModelParams, path=params)
        assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == sizes
        rate = load_params(TrainParams, path=params).embedding_lr
        assert rate == pytest.approx(0.03 * (128 / model.n_embd) ** 0.5, rel=0.03)  # as in `plan`
        if name == "gpt2":
            with torch.device("meta"):
                assert GPT(GPTConfig(**config_fields(model), vocab_size=50257)).n_params() == 124_439_808


def test_the_preset_command_lists_applies_and_suggests(params, command, monkeypatch):
    monkeypatch.chdir(params.parent)
    listed = command("preset").stdout
    assert "toy" in listed and "124,439,808 weights" in listed
    assert "model.n_layer: 4 -> 8" in command("preset", "small").stdout
    assert command("preset", "smal")[::2] == (1, "error: there is no preset smal (did you mean small?)\n")


def test_presets_are_listed_by_size_with_those_without_one_after_them(params, capsys):
    (params.parent / "presets/odd.yaml").write_text("# odd\nmodel: {n_layer: [1], n_embd: 1e400}\n")
    preset(Namespace(name=None))
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    sizes = ["shakespeare", "tiny", "shakespeare-best", "toy", "mini", "small", "wide", "medium", "gpt2", "large"]
    assert listed == [*sizes, *UNSIZED, "odd"]


def test_a_base_that_is_not_there_is_reported(params):
    before = params.read_bytes()
    for name in ("base", "lora"):
        with pytest.raises(UserError, match=r"data/base is empty: run `python -m tinygpt import-hf FOLDER`"):
            preset(Namespace(name=name))
    assert params.read_bytes() == before


def test_a_run_from_a_base_takes_its_model_and_rates_for_its_width(params, tiny_tokenizer, capsys):
    model, rules = tiny_model(n_layer=2), load_yaml((ROOT / "presets/base.yaml").read_bytes())["train"]
    assert model.config.n_embd == 32  # a quarter of the width that the rates are for
    write_base(Path("data/base"), model.config, model_tensors(model), tiny_tokenizer)
    before = comments(params.read_text().splitlines())
    apply_values(params, {"train": {"context_warmup": {"start": 32, "steps": 400}, "embedding_lr": 0.5}})
    for name in ("base", "lora", "base"):
        preset(Namespace(name=name))
        found, train = load_params(ModelParams, TrainParams)
        assert found == ModelParams(**{field: getattr(model.config, field) for field in vars(found)})
        assert (train.init_from, train.lora is None, train.context_warmup) == ("base", name == "base", None)
        assert comments(params.read_text().splitlines()) == before
    assert (train.lr, train.embedding_lr) == pytest.approx((2 * rules["lr"], 2 * rules["embedding_lr"]))
    assert "warning" not in capsys.readouterr().out
    preset(Namespace(name="tiny"))
    assert "warning: training still starts from data/base, which has sizes of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["model: 3", "model: {n_embd", "model: {n_embd: x}", "model: {n_embd: 0}", "- 1", "train: 3"]
)
def test_a_damaged_base_is_reported_and_params_stay(text, params):
    before = params.read_bytes()
    (params.parent / "data/base").mkdir(parents=True)
    (params.parent / "data/base/preset.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data/base is damaged \(.*\): `dvc checkout -f data/base` restores it$"):
        preset(Namespace(name="base"))
    assert params.read_bytes() == before


def test_a_model_that_is_far_too_large_for_the_run_or_the_text_is_warned_of(params, capsys):
    def said(name: str) -> str:
        preset(Namespace(name=name))
        return next((line for line in capsys.readouterr().out.splitlines() if "warning" in line), "")

    before = params.read_bytes()
    assert [name for name in SIZES if said(name)] == ["toy", "wide", "small", "medium", "large", "gpt2"]
    params.write_bytes(before)
    preset(Namespace(name="mini"))
    told = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"mini: 5.3 M weights.* 3,900 steps.*; train.max_steps stays 1,600$", told)
    params.write_bytes(before)
    warning = said("large")
    assert "171,442,176 weights see 13,107,200 tokens in train.max_steps=1600" in warning
    (enough,) = re.findall(r"set train.max_steps=(\d+) or more", warning)
    apply_values(params, {"train": {"max_steps": int(enough)}})
    assert not said("large")
    apply_values(params, {"train": {"max_steps": int(enough) - 1}})
    assert said("large")
    split = SplitMeta(tokens=10**6, documents=1, bytes=10**6, sha256="")
    splits = dict.fromkeys(("train", "val", "test"), split)
    meta = TokensMeta(dtype="<u2", vocab_size=1024, eos_id=0, tokenizer_sha256="", **splits)
    write_json(TOKENS / "meta.json", dataclasses.asdict(meta))
    apply_values(params, {"train": {"max_steps": 10**6}})
    assert "see 4,000,000 tokens in the current text, read 4 times" in said("large")
    assert not said("mini")
    few = {name: dataclasses.replace(split, tokens=1000) for name in splits}
    write_json(TOKENS / "meta.json", dataclasses.asdict(dataclasses.replace(meta, **few)))
    assert said("mini") and not said("shakespeare")  # which has a text of its own
    apply_values(params, {"tokenizer": {"kind": "bpe", "from_file": "none.json"}})
    assert not said("mini")
    (TOKENS / "meta.json").write_text("{")
    assert not said("large")


def test_a_preset_with_an_unknown_key_is_named(params):
    (params.parent / "presets/own.yaml").write_text("model: {n_layr: 2}")
    with pytest.raises(
        UserError, match=r"^presets/own.yaml: unknown key model.n_layr \(did you mean model.n_layer\?\)$"
    ):
        preset(Namespace(name="own"))


def test_a_preset_that_does_not_fit_leaves_params_as_they_are(params):
    before = params.read_bytes()
    with pytest.raises(ParamsError, match="must be a multiple of model.n_head=3"):
        apply_values(params, {"model": {"n_head": 3}})
    assert params.read_bytes() == before
    assert sorted(path.name for path in params.parent.iterdir()) == ["params.yaml", "presets"]


def test_a_link_to_params_stays_one(params):
    params.symlink_to(params.rename(params.parent / "real.yaml"))
    assert apply_values(params, {"model": {"n_layer": 3}})
    assert params.is_symlink() and "n_layer: 3" in (params.parent / "real.yaml").read_text()


@pytest.mark.parametrize(
    ("group", "key"), [("tokenizer", "special_tokens"), ("evaluate", "prompts"), ("export", "gguf")]
)
def test_a_list_is_filled_and_emptied_again(group, key, params):
    apply_values(params, {group: {key: []}})
    before = params.read_text()
    filled = ["f32"] if key == "gguf" else ["<|user|>", "<|pad|>"]
    assert apply_values(params, {group: {key: filled}})
    assert read_groups(params)[group][key] == filled
    apply_values(params, {group: {key: []}})
    assert [line.split() for line in params.read_text().splitlines()] == [line.split() for line in before.splitlines()]


def test_line_ends_of_windows_stay(params):
    before = params.read_text()
    params.write_bytes(before.replace("\n", "\r\n").encode())
    assert apply_values(params, {"model": {"n_layer": 3}})
    after = params.read_bytes().decode()
    assert after == re.sub("n_layer: 4", "n_layer: 3", before).replace("\n", "\r\n")


DAMAGED = {
    "empty": ("", r"params\.yaml must hold the groups download, clean"),
    "a list": ("- model", r"params\.yaml must hold the groups"),
    "flat": (
        "n_layer: 4\nmodel: 3\n",
        r"params\.yaml must hold the groups download, clean, .*, each with its keys, but n_layer; model has",
    ),
    "another group": ("n_layer: {}\n", r"unknown key n_layer\n.*missing key download"),
    "misspelled": ("modle:", r"unknown key modle \(did you mean model\?\)"),
    "a key is missing": ("", r"missing key model\.n_layer"),
    "not YAML": ("a: [", r"params\.yaml is not valid YAML"),
    "deep": ("a: " + "[" * 5000, r"params\.yaml is not valid YAML: at most 20 levels"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_params_file_is_reported_by_name_and_left_alone(name, params):
    text, message = DAMAGED[name]
    if name == "misspelled":
        text = params.read_text().replace("model:\n", "modle:\n")
    if name == "a key is missing":
        text = re.sub("  n_layer: .*\n", "", params.read_text())
    params.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=message):
        apply_values(params, {"model": {"n_layer": 3}})
    assert time.process_time() - began < 2
    assert params.read_text() == text


def test_a_damaged_preset_is_reported_and_presets_are_listed(params, monkeypatch, capsys):
    before = params.read_bytes()
    for text in ("", "- a", "model: 3", "model: {n_leyer: 3}", "model: [", "modle: {n_layer: 3}"):
        (params.parent / "presets/toy.yaml").write_text(text)
        with pytest.raises(UserError, match=r"toy\.yaml|unknown key mod"):
            preset(Namespace(name="toy"))
        assert params.read_bytes() == before
    (params.parent / "presets/toy.yaml").write_bytes(b"# \x1b[2J\xff\n")
    preset(Namespace(name=None))
    assert "toy               \\x1b[2J\ufffd\n" in capsys.readouterr().out


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
