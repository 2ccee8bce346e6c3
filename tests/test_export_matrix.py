"""Every combination of switches has the same logits in llama.cpp and transformers, or is refused with advice."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from conftest import tiny_config
from project import ROOT

from benchmarks.export_matrix import PLAIN, SLIDING, random_model, run
from tinygpt.errors import shown
from tinygpt.export.config import ExportParams
from tinygpt.export.families import ANY_BIAS, CORE, FULL, LLAMA_CPP, Target, find_family, misfit, switches_of
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf, read_hf
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.model.config import MLPS, MLPKind
from tinygpt.params import ParamsError, check_params, from_mapping, require

COMBINATIONS = [dict(zip(CORE, values, strict=True)) for values in product(*CORE.values())]
BOTH = ExportParams(hf=True, gguf=("f32",), check_tokens=4096)
HF, GGUF, NOTHING = (replace(BOTH, gguf=()), replace(BOTH, hf=False), replace(BOTH, hf=False, gguf=()))
TARGETS = (LLAMA_CPP, TRANSFORMERS)


def check(config, export):
    """Check a config as load_params does."""
    require(*export.rules_with({"model": config}))


def covered(target, head_dim=None, **switches):
    """The combinations of CORE, and of these switches, that a family of the target covers without a window."""
    names = [*CORE, *switches]
    return {
        values
        for values in product(*CORE.values(), *switches.values())
        for family in target.families
        if all(value in family.switches[name] for name, value in zip(names, values, strict=True))
        and FULL in family.switches["window"]
        and head_dim in family.switches["head_dim"]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("windows", "head_dim"), [(PLAIN, None), (SLIDING, None), (PLAIN, 24)], ids=["plain", "windows", "head_dim"]
)
def test_logits_are_equal_in_llama_cpp_and_transformers(windows, head_dim):
    found = run(windows, head_dim)
    for combination, programs in found.items():
        gelu = combination[2] == "gelu"  # llama.cpp looks it up in a float16 table
        for program, entries in programs.items():
            assert max(difference for _, difference in entries) < (1e-2 if gelu and program == "llama.cpp" else 1e-4)
            assert len(entries) in (12, 18)  # of three biases, three kinds of heads, tied or not
    for target in TARGETS:
        expected = set(product(covered(target, "own" if head_dim else None), windows))
        assert {(key[: len(CORE)], key[len(CORE) :]) for key in found if target.name in found[key]} == expected


def test_each_family_is_needed_and_no_model_has_two():
    for families in (LLAMA_CPP.families, TRANSFORMERS.families):
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


@pytest.mark.parametrize(
    ("export", "targets"), [(BOTH, TARGETS), (HF, [TRANSFORMERS]), (GGUF, [LLAMA_CPP])], ids=["both", "hf", "gguf"]
)
def test_every_refusal_names_changes_that_work(export, targets):
    refused = 0
    for combination, bias in product(COMBINATIONS, ANY_BIAS):
        config = tiny_config(**combination, bias=bias)
        try:
            check(config, export)
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
            check(replace(config, **changes), export)
    exported = set.intersection(*(covered(target, bias=ANY_BIAS) for target in targets))
    assert refused == len(COMBINATIONS) * len(ANY_BIAS) - len(exported)
    assert exported


def test_a_refusal_names_the_program_and_the_nearest_change():
    config = tiny_config(parallel_block=True)  # plamo: unknown to transformers
    check(config, GGUF)
    with pytest.raises(ParamsError) as caught:
        check(config, BOTH)
    assert "transformers has no model with model.position=rope, model.norm=rmsnorm" in str(caught.value)
    assert "set model.norm=layernorm, or model.parallel_block=false, or turn" in str(caught.value)
    assert "off with export.hf=false" in str(caught.value)


def test_no_advice_asks_for_more_than_another_one_does():
    with pytest.raises(ParamsError) as caught:
        check(tiny_config(position="learned", qk_norm=True), BOTH)
    assert "set model.position=rope, or" in str(caught.value)
    assert "model.position=rope and" not in str(caught.value)


def test_a_head_width_of_its_own_is_refused_where_a_family_derives_it():
    config = tiny_config(norm="layernorm", mlp="gelu", head_dim=12)
    with pytest.raises(ParamsError, match=r"set model\.head_dim=null"):
        check(config, BOTH)


def test_a_kind_of_mlp_that_no_family_has_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(MLPS, "geglu", MLPKind("gelu", gated=True))
    for export in (BOTH, HF, GGUF):
        with pytest.raises(
            ParamsError, match=r"ha(s|ve) no model with .*model\.mlp=geglu.*: set model\.mlp=\w+, or turn"
        ) as caught:
            check(tiny_config(mlp="geglu"), export)
        assert "\n" not in str(caught.value)


def test_check_params_refuses_what_cannot_be_exported(tmp_path):
    params = (ROOT / "params.yaml").read_text()
    assert "  mlp: swiglu " in params
    (tmp_path / "params.yaml").write_text(params.replace("  mlp: swiglu ", "  mlp: relu2  "))
    with pytest.raises(ParamsError, match=r"transformers and llama\.cpp have no model with .*model\.mlp=relu2"):
        check_params(tmp_path / "params.yaml")


def test_the_rule_needs_neither_torch_nor_gguf():
    code = (
        "import sys, tinygpt.export.config; sys.exit(' '.join({'torch', 'gguf', 'numpy'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def coverage_table(*targets: Target) -> str:
    """The combinations of CORE that can be exported, as a Markdown table."""
    columns = [f"{target.name} (bias)" for target in targets]
    rows = [[*(f"`{key}`" for key in CORE), *columns], ["---"] * (len(CORE) + len(targets))]
    for values in product(*CORE.values()):
        cells = [cell(target, dict(zip(CORE, values, strict=True))) for target in targets]
        if any(cells):
            rows.append([*map(shown, values), *(cell or "–" for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(target: Target, core: dict[str, Any]) -> str:
    """The families of a combination, with the biases that they allow."""
    found = [family for family in target.families if not misfit({**core, "window": FULL}, family.switches)]
    return ", ".join(f"`{family.name}` ({', '.join(family.switches['bias'])})" for family in found)


def test_a_family_is_one_entry(monkeypatch, tmp_path, tiny_tokenizer):
    """A second name for Llama's architecture, put before it in both lists, is chosen, written and read there."""
    llama = {target.name: next(f for f in target.families if f.name == "llama") for target in TARGETS}
    second = {"llama.cpp": "internlm2", "transformers": "mistral"}
    classes = {"transformers": {"cls": "MistralForCausalLM"}}
    for target in TARGETS:
        entry = replace(llama[target.name], name=second[target.name], **classes.get(target.name, {}))
        others = [family for family in target.families if family.name != entry.name]
        monkeypatch.setattr(target, "families", (entry, *others))
    model = random_model(tiny_config(n_kv_head=2, n_layer=3, tie_weights=False))
    assert export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "f32").family == "internlm2"
    ids = tiny_tokenizer.encode("the naïve file")
    with torch.inference_mode():
        ours = model(torch.tensor([ids]))[0].log_softmax(-1)
        with LlamaCpp(tmp_path / "model.gguf") as llama_cpp:
            theirs = torch.from_numpy(llama_cpp.logits(ids)).log_softmax(-1)
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
    tiny_tokenizer.save(tmp_path)
    assert export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf") == ("mistral", 64)
    config, tensors = read_hf(tmp_path / "hf")
    assert config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    assert "`internlm2` (none, qkv, all), `llama` (none, qkv, all)" in coverage_table(*TARGETS)


def test_any_model_may_be_trained_when_nothing_is_exported():
    for combination in COMBINATIONS:
        check(tiny_config(**combination), NOTHING)


def test_a_context_too_short_to_check_is_refused_before_training():
    with pytest.raises(ParamsError, match=r"model\.block_size=2 .* at least 4"):
        check(tiny_config(block_size=2), BOTH)
    with pytest.raises(ParamsError, match=r"model\.window=3 .* at least 4"):
        check(tiny_config(qk_norm=True, window=3), BOTH)


def test_a_short_window_counts_only_where_it_shortens_the_context():
    config = tiny_config(window=3, full_every=2)  # llama.cpp has windows, transformers' llama does not
    check(config, BOTH)
    check(config, GGUF)


def test_a_type_given_twice_is_refused():
    with pytest.raises(ParamsError, match="names a type twice"):
        from_mapping(ExportParams, {"hf": True, "gguf": ["f16", "f16"], "check_tokens": 512}, prefix="export.")


def test_the_docs_show_the_table_of_what_can_be_exported():
    rows = coverage_table(*TARGETS).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| learned | layernorm | gelu | false | false | `gpt2` (none, qkv, all) | `gpt2`")
    assert coverage_table(*TARGETS) in (ROOT / "docs/export.md").read_text(encoding="utf-8")
