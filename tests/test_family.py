"""Which models can be exported, and what the refusals advise."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import tiny_config

from tinygpt.export.config import ExportParams
from tinygpt.export.family import FAMILIES, check_export, family_of, family_table
from tinygpt.params import ParamsError, from_mapping

SWITCHES = {
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu"),
    "bias": ("none", "qkv", "all"),
    "qk_norm": (False, True),
}
COMBINATIONS = [dict(zip(SWITCHES, values, strict=True)) for values in product(*SWITCHES.values())]
EXPORTED = [c for c in COMBINATIONS if any(all(c[k] in v for k, v in f.switches.items()) for f in FAMILIES)]
REFUSED = [c for c in COMBINATIONS if c not in EXPORTED]
BOTH = ExportParams(hf=True, gguf=("f32",), check_tokens=4096)
NOTHING = ExportParams(hf=False, gguf=(), check_tokens=4096)


def test_the_families_do_not_overlap_and_are_the_eight_combinations_promised():
    found = [family_of(tiny_config(**combination)).name for combination in EXPORTED]
    assert sorted(found) == ["gpt2"] * 3 + ["llama"] * 3 + ["qwen3"] * 2


@pytest.mark.parametrize("combination", REFUSED, ids=lambda c: "-".join(map(str, c.values())))
def test_every_refusal_names_changes_that_work(combination):
    config = tiny_config(**combination)
    with pytest.raises(ParamsError) as error:
        check_export(config, BOTH)
    message = str(error.value)
    assert all(f"model.{key}={str(value).lower()}" in message for key, value in combination.items())
    advice = message.partition(": set ")[2].partition(", or turn the export off")[0]
    for alternative in advice.split(", or "):
        changes = {key: value.split("|")[0] for key, value in re.findall(r"model\.(\w+)=([\w|]+)", alternative)}
        assert changes
        if "qk_norm" in changes:
            changes["qk_norm"] = changes["qk_norm"] == "true"
        family_of(replace(config, **changes))


def test_any_model_may_be_trained_when_nothing_is_exported():
    check_export(tiny_config(**REFUSED[0]), NOTHING)


def test_a_context_too_short_to_check_is_refused_before_training():
    with pytest.raises(ParamsError, match=r"model\.block_size=2 .* at least 4"):
        check_export(tiny_config(block_size=2), BOTH)


def test_a_type_given_twice_is_refused():
    with pytest.raises(ParamsError, match="names a type twice"):
        from_mapping(ExportParams, {"hf": True, "gguf": ["f16", "f16"], "check_tokens": 512}, prefix="export.")


def test_the_table_for_the_docs_has_a_row_for_each_family():
    rows = family_table().splitlines()
    assert len(rows) == 2 + len(FAMILIES)
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| learned | layernorm | gelu | none, qkv, all | false | `gpt2` | `GPT2LMHeadModel` |"


def test_the_docs_show_the_table_of_families():
    assert family_table() in (Path(__file__).parents[1] / "docs/export.md").read_text(encoding="utf-8")
