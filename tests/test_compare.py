"""Experiments side by side, as a table and as a picture."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from project import make_project, set_params

from tinygpt.report.compare import (
    EVALUATED,
    Made,
    as_text,
    compare_table,
    comparison_view,
    experiment_of,
    find_experiments,
    find_made,
    marks,
)
from tinygpt.report.config import PlotParams
from tinygpt.report.page import curve_rows
from tinygpt.report.plots import plot_curves
from tinygpt.report.reports import Row
from tinygpt.yaml12 import load_yaml

PARAMS = PlotParams(formats=("svg", "png"), dpi=50, smooth=2)


def row(name: str | None = None, state: str | None = None, **changes: Any) -> dict[str, Any]:
    """One of DVC's rows, as dvc.api.exp_show gives it."""
    given = {"train.lr": 0.003, "train.lora": "None", "model.norm": "rmsnorm", "val_loss": 3.25, "split": "test"}
    typ = "branch_commit" if name else "baseline"
    return {"Experiment": name, "rev": "abc1234" if name else "workspace", "typ": typ, "State": state} | given | changes


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return compare_table([experiment_of(one) for one in rows])


def test_params_that_differ_are_shown_as_params_yaml_has_them():
    shown = table(
        row(),
        row("a", **{"train.lr": 1e-05, "train.lora": None, "train.lora.rank": 8.0, "train.seed": 123456789012345.0}),
        row("b", **{"train.seed": 123456789012346.0, "evaluate.prompts": "['a long prompt', 'and another']"}),
    )
    assert shown.to_dict("list") == {
        "experiment": ["workspace", "a", "b"],
        "train.lr": ["0.003", "1e-05", "0.003"],
        "train.lora": ["null", "-", "null"],
        "train.lora.rank": ["-", "8", "-"],
        "train.seed": ["-", "123456789012345", "123456789012346"],
        "evaluate.prompts": ["-", "-", "['a long prompt', 'and …"],
        "val_loss": ["3.2500"] * 3,
    }


def test_the_code_of_stages_is_not_a_param():
    code = {"train": "7dae8e8895dad6d4 python=3.11", "clean": "0077ef71e28dad0a python=3.11"}
    assert experiment_of(row(**code)).params == experiment_of(row()).params


def test_a_table_wider_than_the_terminal_is_printed_in_blocks_with_the_name_in_each():
    shown = table(row(), row("a", **{f"train.param_{i}": float(i) for i in range(9)}))
    whole, lines = as_text(shown, None).splitlines(), as_text(shown, 50).splitlines()
    assert len(whole) == 3 and max(map(len, whole)) > 100 and max(map(len, lines)) <= 50
    assert sum(line.startswith("workspace") for line in lines) == sum(line.startswith("a ") for line in lines) > 2
    assert set(" ".join(lines).replace("\\", "").split()) == set(" ".join(whole).split())


def test_a_metric_that_only_some_have_has_a_column():
    assert table(row(), row("a", ppl=1234.5)).ppl.tolist() == ["-", "1,234.50"]


@pytest.mark.parametrize("state", ["Queued", "Running", "Failed"])
def test_an_unfinished_experiment_does_not_take_the_metrics_of_its_commit(state):
    shown = table(row(), row("a", state), row("b", "Success"))
    assert shown.state.tolist() == ["", state, ""]
    assert shown.val_loss.tolist() == ["3.2500", "-", "3.2500"]


def test_a_training_experiment_does_not_take_the_metrics_of_an_earlier_evaluation():
    shown = table(row(val_loss=None, eval_loss=2.8), row("a", eval_loss=3.5))
    assert shown.eval_loss.tolist() == ["-", "3.5000"]


def test_what_cannot_be_read_is_not_a_number():
    assert table(row(val_loss="!")).columns.tolist() == ["experiment"]


def curve(*losses: float) -> list[Row]:
    rest = {"lr": 0.1, "grad_norm": None}
    return [
        {"step": step + 1.0, "train_loss": loss, "val_loss": loss if step % 2 else None, **rest}
        for step, loss in enumerate(losses)
    ]


def test_the_picture_names_each_curve_and_its_lowest_loss(tmp_path):
    for name in "ab":
        plot_curves({"one": curve(6, 4, 3, 2.5), "other": curve(6, 5)}, tmp_path / f"{name}.svg", PARAMS)
    svg = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("one: 2.500", "other: 5.000", "Training loss", "Validation loss", "loss (nats per token)"):
        assert text in svg
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plot_curves({"flat": curve(3, 3)}, tmp_path / "flat.png", PARAMS)
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")


def made(name: str, loss: float, error: float, **metrics: float) -> Made:
    """An experiment with its reports."""
    one = experiment_of(row(name, val_loss=loss, bpb=loss / 2, **{"train.lr": loss}, **metrics))
    losses, errors = curve(5.0, loss), {"loss_error": error, "bpb_error": 0.0}
    rows = curve_rows(losses, tokens=200, epochs=1.5)
    return Made(**vars(one), curve=losses, rows=rows, eval=errors, samples={"The": " end"})


def test_the_best_is_marked_and_what_the_error_may_explain_is_grey():
    found = [made("a", 3.0, 0.1), made("b", 3.2, 0.1), made("c", 3.5, 0.1, tokens_per_s=7.0)]
    assert marks("val_loss", found) == ["best", "greyed", ""]
    assert marks("bpb", found) == ["best", "", ""]  # without an error
    assert marks("tokens_per_s", found) == ["", "", ""]
    assert marks("ppl", [*found, made("d", 3.0, 0.1, ppl=20.0)]) == ["", "", "", ""]  # with no other, it is no best
    view = comparison_view(found)
    assert [*view["columns"]] == ["train.lr", "val_loss", "bpb", "tokens_per_s"]
    assert view["columns"]["tokens_per_s"] == ["-", "-", "7"]
    assert view["samples"] == [("The", [("a", " end"), ("b", " end"), ("c", " end")])]


def test_an_evaluation_of_another_model_or_with_other_params_is_left_out(project, monkeypatch):
    monkeypatch.chdir(project)
    assert find_experiments()[0].metrics.keys() > EVALUATED
    set_params(project, {"evaluate.seed": 7})
    workspace, head, *_ = find_experiments()
    assert "val_loss" in workspace.metrics and not EVALUATED & workspace.metrics.keys()
    (found,) = find_made([workspace])
    assert (found.eval, found.samples) == ({}, {})
    assert head.metrics.keys() > EVALUATED
    set_params(project, {"evaluate.seed": 1})
    lock = load_yaml(Path("dvc.lock").read_bytes())
    (model,) = (each for each in lock["stages"]["evaluate"]["deps"] if each["path"] == "data/model")
    model["md5"] = f"{0:032}.dir"
    Path("dvc.lock").write_text(json.dumps(lock))
    workspace, head, *_ = find_experiments()
    assert "val_loss" in workspace.metrics and not EVALUATED & workspace.metrics.keys()
    assert head.metrics.keys() > EVALUATED


def test_without_an_evaluation_no_run_is_the_best():
    found = [made("a", 3.0, 0.1), replace(made("b", 3.1, 0.1), eval={})]
    assert marks("val_loss", found) == ["", ""]


@pytest.mark.parametrize(
    ("of_best", "of_other", "mark"), [(0.1, 0.0, "greyed"), (0.0, 0.1, "greyed"), (0.07, 0.06, "")]
)
def test_the_errors_of_both_runs_count(of_best, of_other, mark):
    assert marks("val_loss", [made("a", 3.19, of_other), made("b", 3.0, of_best)]) == [mark, "best"]


def test_experiments_are_read_from_commits_and_workspace_and_equal_ones_are_one(project, command, monkeypatch):
    monkeypatch.chdir(project)
    once = "compare.html shows 1 of 2; equal ones are shown once"
    assert once in command("compare", "--page", "compare.html").stdout
    (project / "reports/train.csv").write_text("step,train_loss,val_loss,lr,grad_norm\n1,5.5,4.25,0.1,\n")
    set_params(project, {"train.lr": 0.0125})
    said = command("compare", "--page", "compare.html").stdout
    assert re.search(r"workspace +Changed +0.0125 +- ", said) and once in said  # params that were never run
    lock = load_yaml(Path("dvc.lock").read_bytes())
    lock["stages"]["train"]["params"]["params.yaml"]["train"]["lr"] = 0.0125
    Path("dvc.lock").write_text(json.dumps(lock))
    assert "compare.html shows 2 of 2" in command("compare", "--page", "compare.html").stdout
    page = (project / "compare.html").read_text()
    monkeypatch.setattr("tinygpt.cli.runs.MOST_CURVES", 1)
    said = command("compare", "--page", "fewer.html").stdout
    assert "fewer.html shows 1 of 2; at most 1, those listed first" in said
    assert ">0.0125<" in page and '"val":4.25' in page and "The beginning of a document" in page
    (project / "reports/train.csv").write_text("step,train_loss\n1,5.5")
    said = command("compare", "--page", "compare.html").stderr
    assert said.startswith("error: reports/train.csv of workspace must have the columns step, train_loss, val_loss")


def test_before_anything_was_trained_there_is_nothing_to_draw(tmp_path, command, monkeypatch):
    make_project(tmp_path)
    set_params(tmp_path, {"train.lr": 0.01})
    monkeypatch.chdir(tmp_path)
    said = command("compare", "--plot", "curves.png")
    assert said.returncode == 1
    assert "error: none of these has reports to show: run `dvc repro`" in said.stderr
    assert ["workspace", "0.01"] in [line.split() for line in said.stdout.splitlines()]


def test_outside_a_project_the_error_is_dvcs(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("compare")
    assert said.returncode == 1
    assert said.stderr.startswith("error: DVC finds no project here (")


@pytest.mark.parametrize(
    ("param", "marked"),
    [
        ("download.source", {}),
        ("tokenizer.kind", {"bpb"}),
        ("evaluate.split", {"val_loss"}),
        ("train.eval_tokens", {"bpb"}),
        ("model.mlp", {"val_loss", "bpb"}),
    ],
)
def test_no_run_is_the_best_where_texts_or_tokens_differ(param, marked):
    found = [made("a", 3.0, 0.1, **{param: "this"}), made("b", 3.2, 0.1, **{param: "that"})]
    assert {name for name in ("val_loss", "bpb") if any(marks(name, found))} == set(marked)
