"""Experiments side by side: as DVC gives them, as a table, as a picture."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import pandas as pd
import pytest
from project import ROOT, make_project, run, set_params, succeed
from test_pipeline import done, project  # noqa: F401  a project after `dvc repro`

from tinygpt.files import read_json
from tinygpt.report.compare import as_text, compare_table, experiment_of, plot_curves
from tinygpt.report.config import PlotParams

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
        row("a", **{"train.lr": 1e-05, "train.lora": None, "train.lora.rank": 8.0}),
        row("b", **{"evaluate.prompts": "['a long prompt', 'and another']"}),
    )
    assert shown.to_dict("list") == {
        "experiment": ["workspace", "a", "b"],
        "train.lr": ["0.003", "1e-05", "0.003"],
        "train.lora": ["null", "-", "null"],
        "train.lora.rank": ["-", "8", "-"],
        "evaluate.prompts": ["-", "-", "['a long prompt', 'and …"],
        "val_loss": ["3.2500"] * 3,
    }


def test_a_table_wider_than_the_terminal_is_told_in_blocks_with_the_name_in_each():
    shown = table(row(), row("a", **{f"train.param_{i}": float(i) for i in range(9)}))
    whole, lines = as_text(shown, None).splitlines(), as_text(shown, 50).splitlines()
    assert len(whole) == 3 and max(map(len, whole)) > 100 and max(map(len, lines)) <= 50
    assert sum(line.startswith("workspace") for line in lines) == sum(line.startswith("a ") for line in lines) > 2
    assert set(" ".join(lines).replace("\\", "").split()) == set(" ".join(whole).split())


def test_metrics_are_found_alone_and_beside_others_of_their_name():
    shown = table(row(), row("a", **{"reports/eval.json:loss": 3.125, "reports/train.json:loss": 9.0, "ppl": 1234.5}))
    assert shown.eval_loss.tolist() == ["-", "3.1250"]
    assert shown.ppl.tolist() == ["-", "1,234.50"]


@pytest.mark.parametrize("state", ["Queued", "Running", "Failed"])
def test_what_is_not_done_has_no_metrics_though_the_commits_reports_lie_beside_it(state):
    shown = table(row(), row("a", state), row("b", "Success"))
    assert shown.state.tolist() == ["", state, ""]
    assert shown.val_loss.tolist() == ["3.2500", "-", "3.2500"]


def test_what_cannot_be_read_is_no_number():
    assert table(row(val_loss="!")).columns.tolist() == ["experiment"]


def curve(*losses: float) -> pd.DataFrame:
    val = [loss if step % 2 else None for step, loss in enumerate(losses)]
    return pd.DataFrame({"step": range(1, len(losses) + 1), "train_loss": losses, "val_loss": val})


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


@pytest.mark.slow
def test_experiments_of_dvc_are_compared_and_drawn(project, command, monkeypatch):  # noqa: F811
    monkeypatch.chdir(project)
    assert "no experiments of this commit yet" in command("compare").stdout
    succeed("dvc exp run --temp -n wide -S train.lr=1e-2 evaluate", project)
    succeed("dvc exp run --queue -n later -S model.n_layer=2", project)
    assert succeed("git status --porcelain", project) == ""  # both leave the folder alone
    said = command("compare", "--plot", "curves.svg").stdout
    rows = {line.split()[0]: line.split() for line in said.splitlines()}
    wide = read_json(project / "reports/train.json", stage="train")["val_loss"]
    head = rows["experiment"]
    assert head[:6] == ["experiment", "state", "model.n_layer", "train.lr", "val_loss", "eval_loss"]
    assert rows["workspace"][1:4] == rows["main"][1:4] == ["1", "0.008", f"{wide:.4f}"]
    assert rows["later"][1:5] == ["Queued", "2", "0.008", "-"]
    loss = float(rows["wide"][3])
    assert rows["wide"][1:3] == ["1", "0.01"] and loss < wide
    assert said.endswith("curves.svg shows 2 of 2 curves\n")  # the workspace is that of the commit
    svg = (project / "curves.svg").read_text()
    assert f"wide: {loss:.3f}" in svg and f"main: {wide:.3f}" in svg
    named = command("compare", "wide", "workspace").stdout.splitlines()
    assert [line.split()[0] for line in named] == ["experiment", "wide", "workspace"]
    assert float(named[1].split()[2]) == loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere", "error: DVC finds no nowhere here (unknown Git revision 'nowhere'): see `git log` and `dvc exp"),
        ("--plot curves.jpg", "error: --plot curves.jpg: the name must end in .svg or .png"),
    ],
)
def test_a_mistake_is_one_line(project, options, message):  # noqa: F811
    said = run(f"python -m tinygpt compare {options}", project)
    assert said.returncode == 1
    assert said.stdout.startswith(message) and len(said.stdout.splitlines()) == 1


def test_before_anything_was_trained_there_is_nothing_to_draw(tmp_path):
    make_project(tmp_path)
    set_params(tmp_path, {"train.lr": 0.01})
    said = run("python -m tinygpt compare --plot curves.png", tmp_path)
    assert said.returncode == 1
    assert "error: none of these has a reports/train.csv to draw: run `dvc repro train`" in said.stdout
    assert ["workspace", "0.01"] in [line.split() for line in said.stdout.splitlines()]


def test_outside_a_project_dvc_says_so(tmp_path):
    said = run("python -m tinygpt compare", tmp_path, PYTHONPATH=str(ROOT))
    assert said.returncode == 1
    assert said.stdout.startswith("error: DVC finds no project here (")
