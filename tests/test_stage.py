"""A stage as a program: its help, and its answer to arguments."""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from project import ROOT, SMALL, corpus, make_project, run_stages, set_params

from stages import evaluate
from tinygpt.stage import run_stage

STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with params and nothing else that stages could work on."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(name: str, *arguments: str, monkeypatch) -> int:
    """The exit status of a stage; a text is printed, as Python does."""
    monkeypatch.setattr(sys, "argv", [f"stages/{name}.py", *arguments])
    try:
        run_stage(importlib.import_module(f"stages.{name}").run)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return 1 if isinstance(left.code, str) else left.code
    return 0


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_refuses_arguments_and_does_nothing(name, folder, monkeypatch, capsys):
    for arguments in (["--split", "val"], ["--n-layer=8"], ["val"], ["--help", "--force"], ["-f"], ["\x1b[2J"]):
        assert start(name, *arguments, monkeypatch=monkeypatch) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: a stage takes no arguments, found ") and "set params with `dvc exp run -S " in err
        assert err.strip().isprintable()
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("name", STAGES)
def test_help_says_what_a_stage_does_and_its_keys_with_their_comments(name, folder, monkeypatch, capsys):
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_bytes(text.replace("\n", "\r\n").encode())
    assert start(name, "--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.startswith(importlib.import_module(f"stages.{name}").__doc__)
    source = (ROOT / f"stages/{name}.py").read_text()
    for block in text.rstrip().split("\n\n")[1:]:
        group = block.partition(":")[0]
        assert (f"\n{block}\n" in said) == (f"{group.capitalize()}Params" in source), group
        assert (f"\n{group}:" in said) == (f"{group.capitalize()}Params" in source), group
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


def test_git_sees_a_value_that_dvc_wrote_and_a_stage_refused(folder, monkeypatch):
    set_params(folder, {"evaluate.context": 10**6})
    os.utime("params.yaml", (1, 1))
    assert start("code", monkeypatch=monkeypatch) == 1 and Path("params.yaml").stat().st_mtime == 1
    monkeypatch.setenv("DVC_STAGE", "code")
    assert start("code", monkeypatch=monkeypatch) == 1 and Path("params.yaml").stat().st_mtime > 1


@pytest.mark.parametrize("name", STAGES)
def test_what_a_later_stage_would_refuse_is_refused_by_every_stage(name, folder, monkeypatch, capsys):
    set_params(folder, {"evaluate.context": 10**6})
    assert start(name, monkeypatch=monkeypatch) == 1
    assert "evaluate.context=1000000 must be at most model.block_size" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("edited", "status"), [("evaluate.seed", 1), ("evaluate.split", 1), ("train.seed", 0), ("runtime.n_thread", 0)]
)
def test_params_that_change_while_a_stage_uses_them_are_not_recorded(edited, status, folder, monkeypatch, capsys):
    value = {"evaluate.split": "val"}.get(edited, 2)
    monkeypatch.setattr(evaluate, "run", lambda root: set_params(root, {edited: value}))
    monkeypatch.setattr(evaluate.run, "__module__", "stages.evaluate")
    assert start("evaluate", monkeypatch=monkeypatch) == status
    said = f"error: params.yaml was edited while this stage ran ({edited}), and its results are those of the old values"
    assert capsys.readouterr().err.startswith(said) == bool(status)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.n_layer": 1000, "model.n_embd": 16384},
        {"train.batch_size": 2**40},
        {"model.block_size": 2**30, "model.position": "learned", "export.hf": False, "export.gguf": []},
    ],
    ids=str,
)
def test_a_model_that_this_machine_cannot_hold_is_reported_before_any_work(changes, folder, monkeypatch, capsys):
    set_params(folder, changes)
    assert start("download", monkeypatch=monkeypatch) == 1
    assert re.match(r"error: model: [\d,]+ weights and .* this machine has .*: lower model\.", capsys.readouterr().err)
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


def test_a_stage_outside_the_project_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--help"]):
        assert start("plot", *arguments, monkeypatch=monkeypatch) == 1
        assert capsys.readouterr().err == "error: params.yaml not found: run this from the project's top folder\n"
    assert not [*Path().iterdir()]


def test_a_small_book_goes_through_all_stages(tmp_path):
    make_project(tmp_path, SMALL | {"clean.separator": None, "clean.split": "tail", "tokenizer.vocab_size": 290})
    (tmp_path / "corpus.txt").write_text(corpus()[:9000], encoding="utf-8")
    said = run_stages("download clean train_tokenizer encode train evaluate export", tmp_path)
    (n_test,) = re.findall(r"encode: test (\d+) tokens", said)
    assert int(n_test) < 512
    assert "export: q8_0" in said
