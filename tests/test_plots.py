"""Plots: the same numbers give the same bytes, and plots show what they should."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tinygpt.errors import UserError
from tinygpt.report.config import PlotParams
from tinygpt.report.plots import FIGURES, Tables, as_table, read_tables, smoothed, write_plots
from tinygpt.report.reports import COLUMNS, Row
from tinygpt.report.training import as_csv

PARAMS = PlotParams(formats=("svg", "png"), dpi=50, smooth=3)


@pytest.fixture
def curve() -> list[Row]:
    steps = range(1, 21)
    val = [3 - step / 10 if step % 5 == 0 and step < 20 else (1.9 if step == 20 else None) for step in steps]
    rest = {"lr": 1e-3, "grad_norm": 0.5}
    return [{"step": s, "train_loss": 3 - s / 20, "val_loss": v, **rest} for s, v in zip(steps, val, strict=True)]


NORMS: list[Row] = [
    {"step": 5, "tok_emb": 0.5, "block_0": 1.0, "norm": 0.1},
    {"step": 10, "tok_emb": 0.25, "block_0": 0.0, "norm": 0.2},
]


@pytest.fixture
def tables(curve) -> Tables:
    return Tables(as_table(curve), as_table(NORMS))


def test_plots_are_whole_files_with_labels_and_the_best_step(tables, tmp_path):
    names = write_plots(tables, tmp_path / "plots", PARAMS)
    assert names == ["loss.svg", "loss.png", "optimizer.svg", "optimizer.png", "norms.svg", "norms.png"]
    svg = (tmp_path / "plots/loss.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("best: 1.500 at step 15", "train", "validation", "loss (nats per token)", "step"):
        assert text in svg
    assert "learning rate" in (tmp_path / "plots/optimizer.svg").read_text()
    assert "block_0" in (tmp_path / "plots/norms.svg").read_text()
    assert (tmp_path / "plots/loss.png").read_bytes().startswith(b"\x89PNG")


def test_plots_have_the_same_bytes_each_time(tables, tmp_path):
    for name in "ab":
        write_plots(tables, tmp_path / name, PARAMS)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.fixture
def reports(curve, tmp_path) -> Path:
    """A folder with both tables."""
    (tmp_path / "train.csv").write_text(as_csv(curve))
    (tmp_path / "train_norms.csv").write_text(as_csv(NORMS))
    return tmp_path


def test_tables_are_read_as_they_were_written(tables, reports):
    for found, expected in zip(read_tables(reports), tables, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_equal(found.tolist(), expected.tolist())


@pytest.mark.parametrize(("n", "at_8"), [(1, 2.6), (2, 2.625), (3, 2.6), (4, 2.625), (100, 2.475)])
def test_a_training_loss_is_the_mean_of_the_rows_around_it(n, at_8, tables):
    steps, losses = smoothed(tables.curve, replace(PARAMS, smooth=n))
    assert dict(zip(steps, losses, strict=True))[8] == pytest.approx(at_8)
    assert len(losses) == 20 and losses[0] == pytest.approx(np.mean(tables.curve.train_loss[: (n + 1) // 2]))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(COLUMNS) + "\n", ",".join(COLUMNS) + "\n1,2,3,4,5,6\n"])
def test_a_file_that_is_not_a_curve_is_refused(text, reports):
    (reports / "train.csv").write_text(text)
    with pytest.raises(UserError, match="train.csv .*run `dvc repro train`"):
        read_tables(reports)


def test_a_curve_cut_anywhere_is_refused_or_drawn_as_far_as_it_goes(reports, tmp_path):
    whole = (reports / "train.csv").read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    drawn = 0
    for n in range(len(whole)):
        (reports / "train.csv").write_bytes(whole[:n])
        try:
            tables = read_tables(reports)
        except UserError as error:
            assert "train.csv" in str(error) and "run `dvc repro train`" in str(error)
        else:
            assert n in ends and len(tables.curve) == ends.index(n) - 1 >= 5  # with a validation loss
            drawn += 1
    assert drawn == len(ends) - 7
    write_plots(tables, tmp_path / "plots", PARAMS)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (3, "2,2.9,,0.001"),
        (3, "2,2.9,,0.001,0.5,1"),
        (3, "2,x,,0.001,0.5"),
        (4, "2,2.85,,0.001,0.5"),
        (9, "8,inf,,0.001,0.5"),
        (5, ",,,,"),
    ],
)
def test_a_damaged_row_is_reported_with_its_line(line, text, reports):
    lines = (reports / "train.csv").read_text().splitlines()
    lines[line - 1] = text
    (reports / "train.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"train.csv is cut off or damaged in line {line}: run `dvc repro train`"):
        read_tables(reports)


def test_a_curve_without_a_validation_loss_is_refused(curve, reports):
    (reports / "train.csv").write_text(as_csv([row | {"val_loss": None} for row in curve]))
    with pytest.raises(UserError, match=r"train.csv has no validation loss: run `dvc repro train`"):
        read_tables(reports)


@pytest.mark.parametrize("text", ["step\n1\n", "step,a\x0cb\n1,1\n", "step,a,a\n1,1,1\n", "a,step\n1,1\n"])
def test_norms_without_a_part_are_refused(text, reports):
    (reports / "train_norms.csv").write_text(text)
    with pytest.raises(UserError, match=r"norms.csv must have the columns step, one for each part"):
        read_tables(reports)


def test_a_figure_is_a_function_and_an_entry(tables, tmp_path, monkeypatch):
    def plot_lr(tables: Tables, params: PlotParams) -> Figure:
        figure = Figure()
        figure.subplots().plot(tables.curve.step, tables.curve.lr)
        return figure

    monkeypatch.setitem(FIGURES, "lr", plot_lr)
    assert "lr.png" in write_plots(tables, tmp_path / "plots", PARAMS)
    assert (tmp_path / "plots/lr.png").read_bytes().startswith(b"\x89PNG")
