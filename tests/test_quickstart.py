"""A model from a text in one call, as in docs/training.md, and a run of a preset in a folder of its own."""

import hashlib
import math
import re
import shutil

import pytest
from project import ROOT, SMALL, corpus, run_stages
from ruamel.yaml import YAML

import quickstart
from tinygpt.errors import UserError
from tinygpt.generate import generate

TINY = {key: value for key, value in SMALL.items() if key != "download.source"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "my.txt").write_text(corpus(), encoding="utf-8")
    return tmp_path


def test_the_page_trains_writes_and_counts_weights(folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    exec(code.replace('"train.max_steps": 300', '"train.max_steps": 21'), {})
    said = capsys.readouterr().out
    assert "step     21 of 21" in said
    first = float(re.search(r"val loss (\S+)", said)[1])  # before the first step
    assert first < math.log(512) - 1  # a uniform guess over its tokens
    assert said.endswith("1,870,464 weights\n")
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "my.txt"]  # the project itself is not touched


def test_the_same_call_reads_the_finished_run_and_another_trains(folder, capsys):
    model, tokenizer = quickstart.model_from_text("my.txt", TINY)
    text = generate(model, tokenizer, "The ", max_new_tokens=10)
    assert not model.training
    assert "step     40 of 40" in capsys.readouterr().out
    again, _ = quickstart.model_from_text("my.txt", TINY)
    assert "step     " not in capsys.readouterr().out
    assert generate(again, tokenizer, "The ", max_new_tokens=10) == text
    quickstart.model_from_text("my.txt", TINY | {"train.seed": 2})
    assert "step     40 of 40" in capsys.readouterr().out
    assert "perplexity" in run_stages("evaluate", folder / "quickstart")


def test_wrong_names_are_refused_as_in_params_yaml(folder):
    with pytest.raises(UserError, match=r"unknown key model.n_layers \(did you mean model.n_layer\?\)"):
        quickstart.model_from_text("my.txt", {"model.n_layers": 2})
    with pytest.raises(UserError, match=r"runtime.n_process=2 must be 1.*\n.*quickstart trains from scratch"):
        quickstart.model_from_text("my.txt", {"runtime.n_process": 2, "train.init_from": "base"})
    with pytest.raises(UserError, match="neither a known source .* nor a file or folder"):
        quickstart.model_from_text("your.txt")


def test_a_folder_with_other_files_is_refused_and_left_alone(folder):
    (folder / ".gitignore").write_text("data\n")
    before = sorted(path.name for path in folder.iterdir())
    for name in (".", folder):
        with pytest.raises(
            UserError, match=r"quickstart did not make .*gitignore: move it away, or choose another folder"
        ):
            quickstart.model_from_text("my.txt", folder=name)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / ".gitignore").read_text() == "data\n"
    (folder / ".gitignore").unlink()
    for name in ("data", "params.yaml"):
        (folder / name).mkdir()
        with pytest.raises(UserError, match=f"quickstart did not make {name}"):
            quickstart.new_project(".", {})
        (folder / name).rmdir()
    quickstart.new_project(".", {})  # other files do not disturb


def test_paths_are_those_of_the_current_folder_and_a_sources_name_is_not_one(folder):
    (folder / "tiny").mkdir()
    (folder / "tok").mkdir()
    (folder / "tok/tokenizer.json").touch()
    values = {"download.source": "tiny", "tokenizer.from_file": "tok/tokenizer.json", "tokenizer.kind": "bpe"}
    project = quickstart.new_project("mine", values)
    params = YAML(typ="safe", pure=True).load(project / "params.yaml")
    assert params["download"]["source"] == "tiny"
    assert params["tokenizer"]["from_file"] == str(folder / "tok/tokenizer.json")
    quickstart.new_project("mine", {"tokenizer.from_file": None})


def test_a_presets_run_is_a_folder_with_all_that_the_pipeline_makes(folder, monkeypatch, capsys):
    text = corpus().replace("ï", "i").encode()
    (folder / "mirror").mkdir()
    (folder / "mirror/tinyshakespeare.txt").write_bytes(text)
    preset = YAML(typ="safe", pure=True).load(ROOT / "presets/shakespeare.yaml")
    preset["download"]["sha256"] = hashlib.sha256(text).hexdigest()
    preset["model"] |= {"n_layer": 1, "n_embd": 32, "block_size": 64}
    preset["train"] |= {"max_steps": 21, "sample_tokens": 0}
    preset["evaluate"]["max_new_tokens"] = 5
    (folder / "presets").mkdir()
    YAML().dump(preset, folder / "presets/shakespeare.yaml")
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.setenv("TINYGPT_MIRROR", str(folder / "mirror"))
    monkeypatch.setattr(quickstart, "ROOT", folder)
    monkeypatch.setattr("sys.argv", ["quickstart", "shakespeare"])
    quickstart.main()
    said = capsys.readouterr().out
    assert "split by tail" in said
    assert "evaluate: val split" in said
    assert (folder / "shakespeare/data/export/gguf/tinygpt-q8_0.gguf").exists()
    assert (folder / "shakespeare/reports/index.html").exists()
    assert (folder / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    monkeypatch.setattr("sys.argv", ["quickstart", "shakespear"])
    with pytest.raises(SystemExit, match="error: there is no preset shakespear"):
        quickstart.main()
