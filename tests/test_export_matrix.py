"""Every combination of switches in real llama.cpp and real transformers: the same logits, or a refusal that helps."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import tiny_config

from benchmarks.export_matrix import PLAIN, SLIDING, run
from tinygpt.export.config import ExportParams
from tinygpt.export.coverage import CORE, check_export, coverage_table
from tinygpt.export.family import ANY_BIAS, find_family, switches_of
from tinygpt.export.gguf_families import GGUF_FAMILIES
from tinygpt.export.hf_families import HF_FAMILIES
from tinygpt.params import ParamsError, from_mapping

COMBINATIONS = [dict(zip(CORE, values, strict=True)) for values in product(*CORE.values())]
BOTH = ExportParams(hf=True, gguf=("f32",), check_tokens=4096)
HF, GGUF, NOTHING = (replace(BOTH, gguf=()), replace(BOTH, hf=False), replace(BOTH, hf=False, gguf=()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("windows", "head_dim", "n_llama_cpp", "n_transformers"),
    [
        (PLAIN, None, 11, 12),
        (SLIDING, None, 22, 24),
        (PLAIN, 24, 3, 4),
    ],
    ids=["plain", "windows", "head_dim"],
)
def test_logits_are_equal_in_llama_cpp_and_transformers(windows, head_dim, n_llama_cpp, n_transformers):
    found = run(windows, head_dim)
    for combination, programs in found.items():
        gelu = combination[2] == "gelu"  # llama.cpp looks it up in a float16 table
        for program, entries in programs.items():
            assert max(difference for _, difference in entries) < (1e-2 if gelu and program == "llama.cpp" else 1e-4)
            assert len(entries) in (12, 18)  # of three biases, three kinds of heads, tied or not
    assert sum("llama.cpp" in programs for programs in found.values()) == n_llama_cpp
    assert sum("transformers" in programs for programs in found.values()) == n_transformers


def test_each_family_is_needed_and_no_model_has_two():
    for families in (GGUF_FAMILIES, HF_FAMILIES):
        used = set()
        windows = [*PLAIN, (6, None), (6, 2)]
        for core, bias, tied, (window, full_every) in product(COMBINATIONS, ANY_BIAS, (False, True), windows):
            config = tiny_config(**core, bias=bias, tie_weights=tied, window=window, full_every=full_every)
            plain = switches_of(config) | {"window": "null"}
            fitting = [f for f in families if all(plain[key] in values for key, values in f.switches.items())]
            assert len(fitting) <= 1
            if found := find_family(families, config):
                used.add(found[0].name)
                honoured = switches_of(config)["window"] in found[0].switches["window"]
                assert found[1] == (64 if honoured else 6)
        assert used == {family.name for family in families}


@pytest.mark.parametrize("export", [BOTH, HF, GGUF], ids=["both", "hf", "gguf"])
def test_every_refusal_names_changes_that_work(export):
    refused = 0
    for combination, bias in product(COMBINATIONS, ANY_BIAS):
        config = tiny_config(**combination, bias=bias)
        try:
            check_export(config, export)
            continue
        except ParamsError as error:
            message = str(error)
        refused += 1
        assert all(f"model.{key}={str(value).lower()}" in message for key, value in combination.items())
        advice = message.partition(": set ")[2].partition(", or turn that export off")[0]
        for alternative in advice.split(", or "):
            changes = {key: value.split("|")[0] for key, value in re.findall(r"model\.(\w+)=([\w|]+)", alternative)}
            assert changes
            changes |= {key: value == "true" for key, value in changes.items() if value in ("true", "false")}
            check_export(replace(config, **changes), export)
    assert refused == {BOTH: 144 - 24, HF: 144 - 31, GGUF: 144 - 26}[export]


def test_a_refusal_names_the_program_and_the_nearest_change():
    config = tiny_config(parallel_block=True)  # plamo: unknown to transformers
    check_export(config, GGUF)
    with pytest.raises(ParamsError) as caught:
        check_export(config, BOTH)
    assert "no model of transformers has model.position=rope, model.norm=rmsnorm" in str(caught.value)
    assert "set model.norm=layernorm, or model.parallel_block=false, or turn" in str(caught.value)
    assert "off with export.hf=false" in str(caught.value)


def test_no_advice_asks_for_more_than_another_one_does():
    with pytest.raises(ParamsError) as caught:
        check_export(tiny_config(position="learned", qk_norm=True), BOTH)
    assert "set model.position=rope, or" in str(caught.value)
    assert "model.position=rope and" not in str(caught.value)


def test_a_head_width_of_its_own_is_refused_where_a_family_derives_it():
    config = tiny_config(norm="layernorm", mlp="gelu", head_dim=12)
    with pytest.raises(ParamsError, match=r"set model\.head_dim=null"):
        check_export(config, BOTH)


def test_any_model_may_be_trained_when_nothing_is_exported():
    for combination in COMBINATIONS:
        check_export(tiny_config(**combination), NOTHING)


def test_a_context_too_short_to_check_is_refused_before_training():
    with pytest.raises(ParamsError, match=r"model\.block_size=2 .* at least 4"):
        check_export(tiny_config(block_size=2), BOTH)
    with pytest.raises(ParamsError, match=r"model\.window=3 .* at least 4"):
        check_export(tiny_config(qk_norm=True, window=3), BOTH)


def test_a_short_window_counts_where_it_shortens_the_context_alone():
    config = tiny_config(window=3, full_every=2)  # llama.cpp honours it, transformers' llama does not
    check_export(config, BOTH)
    check_export(config, GGUF)


def test_a_type_given_twice_is_refused():
    with pytest.raises(ParamsError, match="names a type twice"):
        from_mapping(ExportParams, {"hf": True, "gguf": ["f16", "f16"], "check_tokens": 512}, prefix="export.")


def test_the_docs_show_the_table_of_what_can_be_exported():
    rows = coverage_table().splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| learned | layernorm | gelu | false | false | `gpt2` (none, qkv, all) | `gpt2`")
    assert coverage_table() in (Path(__file__).parents[1] / "docs/export.md").read_text(encoding="utf-8")
