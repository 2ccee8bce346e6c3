"""benchmarks/gpu.py, rehearsed on a CPU at the smallest sizes."""

import dataclasses
import json
import time

import pytest

from benchmarks.gpu import findings, run_part, table
from benchmarks.gpu_parts import PARTS, Setup

PROCESSES = ("tests", "processes")  # these start programs


@pytest.mark.parametrize("name", [name for name in PARTS if name not in PROCESSES])
def test_each_case_of_a_part_finds_something(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    setup = Setup(None, time.time() + 600, quick=True, tiny=True)
    run_part(name, setup, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row for row in rows if row["what"] in ("failed", "left out")] == []
    assert {row["case"] for row in rows} >= set(PARTS[name].cases(setup)) - {"out of memory"}
    assert table(rows).count("\n") == len(rows) + 1


def test_what_fails_or_has_no_time_is_a_row():
    def broken():
        yield "loss", 1.0, ""
        raise ValueError("\nno such kernel\nmore")

    assert list(findings(broken, 60)) == [("loss", 1.0, ""), ("failed", "ValueError", "no such kernel")]
    assert list(findings(broken, 1)) == [("left out", "", "no time was left")]


def test_more_is_measured_without_quick():
    setup = Setup(None, time.time() + 600, quick=True)
    for part in PARTS.values():
        assert set(part.cases(setup)) <= set(part.cases(dataclasses.replace(setup, quick=False)))
