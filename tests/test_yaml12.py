"""params.yaml is read as by DVC, and nothing in it takes much time or memory."""

import datetime
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import parse_yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tinygpt.yaml12 import load_yaml

ROOT = Path(__file__).parents[1]


def meaning(value: Any) -> Any:
    """A value with its type, for comparison: NaN equals itself, and a time does whatever its zone is called."""
    if isinstance(value, dict):
        return {meaning(key): meaning(item) for key, item in value.items()}
    if isinstance(value, list):
        return [meaning(item) for item in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return "NaN" if isinstance(value, float) and math.isnan(value) else (type(value), value)


def readings(text: str) -> list[Any]:
    """What tinygpt, ruamel.yaml and DVC read; "refused" if one cannot."""
    found = []
    for read in (lambda: load_yaml(text.encode()), lambda: YAML(typ="safe").load(text), lambda: parse_yaml(text, "")):
        try:
            found.append(meaning(read() or {}))  # DVC reads an empty file as no groups
        except Exception:
            found.append("refused")
    return found


@pytest.mark.parametrize("path", ["params.yaml", "dvc.yaml", *(f"presets/{p.name}" for p in ROOT.glob("presets/*"))])
def test_our_own_files_mean_the_same_to_all_three(path: str) -> None:
    ours, *others = readings((ROOT / path).read_text())
    assert ours != "refused"
    assert others == [ours, ours]


SCALARS = [
    "1e3",
    "1e-05",
    "0x1F",
    "0o17",
    "017",
    "089",
    "0b11",
    "1_000",
    "1:30",
    "1.",
    ".5",
    "-.inf",
    ".nan",
    "on",
    "No",
]
SCALARS += [
    "~",
    "",
    "null",
    "True",
    "y",
    "=",
    "2024-01-02",
    "2024-13-01",
    "2001-12-14 21:59:43.1 -5",
    "+_",
    "._",
    "0o8",
]


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_that_differ_between_versions_mean_the_same_to_all_three(scalar: str) -> None:
    ours, *others = readings(f"a: {scalar}\n")
    assert others == [ours, ours]


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.text("0123456789+-_.eExXobBaAfFtTrRuUlLsSnNyY~:= ", max_size=9))
@example("1e400")
def test_scalars_mean_the_same_to_all_three(scalar: str) -> None:
    ours, *others = readings(f"a: {scalar}\n")
    assert others == [ours, ours]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "1: a\n1.0: b",
        "a: 1\n---\nb: 2",
        "%YAML 1.1\n---\na: on",
        "%YAML 1.3\n---\na: 1",
    ],
)
def test_what_could_mean_two_things_is_refused(text: str) -> None:
    assert readings(text)[0] == "refused"


def test_a_mapping_that_is_merged_twice_keeps_its_keys() -> None:
    ours, *others = readings("x: &x {a: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: *y, a: 3}\n")
    assert others == [ours, ours]


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
DAMAGED = {
    "aliases of aliases": LAUGHS,
    "merges of merges": LAUGHS.replace("[x, x]", "{k: 1}").replace("[", "{<<: [").replace("]", "]}"),
    "itself": "a: &a [*a]",
    "deep": "a: " + "[" * 90_000,
    "digits": "a: " + "1" * 5_000,
    "hex": "a: 0x" + "f" * 5_000,
    "many": "a: [" + "1, " * 50_000 + "1]",
    "large": "a: " + "x" * 10**6,
    "date": "a: !!timestamp x",
    "switch": "a: !!bool x",
    "character": 'a: "\\Uffffffff"',
    "a class": "a: !!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_read_is_one_line_soon_and_in_little_memory(text: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^[ -~]+$"):
        load_yaml(text.encode())
    assert time.process_time() - began < 5  # seconds; tracing takes most of them
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@settings(max_examples=300, derandomize=True, deadline=2000)
@given(st.text("a1-.:&*!|>?%@'\"[]{},#<~ \n", max_size=60))
@example("? *a")
@example("&a")
def test_any_text_is_read_or_is_one_line(text: str) -> None:
    try:
        load_yaml(text.encode())
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["2024-99-99", "!!int abc", "!!bool x"])
def test_a_value_that_cannot_be_read_is_named_by_its_place(value: str) -> None:
    with pytest.raises(ValueError, match="^this value is not valid at line 2, column 4$"):
        load_yaml(f"a: 1\nb: {value}\n".encode())


def test_a_comment_may_speak_of_yaml() -> None:
    assert load_yaml(b"# %YAML 1.1\na: on\n") == {"a": "on"}
