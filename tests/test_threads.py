"""How threads wait, and how many there are."""

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from tinygpt import threads


def test_what_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(threads, "n_cpu", lambda: 0)  # fewer than any machine has
    for given in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}):
        environment = {**given, "OMP_NUM_THREADS": "7"}
        threads.set_waiting(environment)
        assert environment == {**given, "OMP_NUM_THREADS": "7"}
    environment = {}
    threads.set_waiting(environment)
    assert environment == {"GOMP_SPINCOUNT": threads.SPIN, "OMP_NUM_THREADS": "0"}


@pytest.mark.parametrize(
    ("newer", "older", "expected"),
    [
        ("150000 100000\n", None, 2),
        ("100000 100000\n", "50000", 1),
        ("max 100000\n", "50000", None),
        (None, "250000\n", 3),
        (None, "-1\n", None),
        (None, None, None),
    ],
)
def test_a_container_s_quota_is_rounded_up(tmp_path, newer, older, expected):
    files = tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"
    for path, text in zip(files, (newer, older), strict=True):
        if text is not None:
            path.write_text(text)
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.quota(files) == expected


@pytest.mark.parametrize("first", ["stages.train", "tinygpt.model.gpt", "benchmarks.training", "conftest"])
def test_thread_waiting_is_set_before_pytorch_is_loaded(first):
    code = f"""
import builtins, os, sys
original = builtins.__import__
def watched(name, *args, **kwargs):
    if name.partition(".")[0] == "torch" and "torch" not in sys.modules:
        sys.exit(os.environ.get("GOMP_SPINCOUNT") != "{threads.SPIN}")
    return original(name, *args, **kwargs)
builtins.__import__ = watched
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
import {first}
import torch
"""
    environment = {"PATH": str(Path(sys.executable).parent), "HOME": "/nonexistent"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode == 0
