"""The structure of the code: which parts may import which, and what dvc.yaml says about it."""

import ast
import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tinygpt import code, params, paths, shards
from tinygpt.model import attention, config, layers
from tinygpt.model.config import ModelParams
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import kinds
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.train import loss, optim, parallel, schedules
from tinygpt.train.config import TrainParams

ROOT = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")

# A room imports only from itself and from rooms above it.
ROOMS = [
    ["code", "errors", "paths", "threads", "yaml12"],
    ["files", "progress"],
    ["params"],
    ["options"],
    ["runtime"],
    ["shards"],
    ["corpus"],
    ["tokenizer"],
    ["tokens"],
    ["encode"],
    ["model"],
    ["stage"],
    ["train", "generate"],
    ["run", "report"],
    ["export"],
    ["serve", "plan"],
    ["cli"],
    ["__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
LIBRARY = sorted(path for path in (ROOT / "tinygpt").rglob("*.py"))
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    return path.relative_to(ROOT / "tinygpt").parts[0].removesuffix(".py")


def test_a_room_imports_only_from_rooms_above_it():
    for path in LIBRARY:
        for imported in code._read(path).ours:
            if imported != ROOT / "tinygpt/__init__.py" and path != ROOT / "tinygpt/__init__.py":
                same = room(imported) == room(path)
                assert same or RANK[room(imported)] < RANK[room(path)], f"{path} may not import {imported}"


def test_nothing_in_the_library_imports_a_stage():
    for path in LIBRARY:
        assert not re.search(r"^\s*(from|import) stages", path.read_text(), re.MULTILINE), path


def test_imports_are_written_in_full():
    for path in LIBRARY:
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
            assert not (isinstance(node, ast.Import) and any(a.name.startswith("tinygpt") for a in node.names)), path


def test_every_stage_except_code_tracks_its_own_code_and_no_file_of_it():
    for name, stage in PIPELINE["stages"].items():
        named = [group for group in stage.get("params", []) if isinstance(group, dict)]
        assert named == ([] if name == "code" else [{str(paths.CODE): [name]}])
        assert not [dep for dep in stage.get("deps", []) if dep.endswith(".py")]
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 125


def test_what_decides_weights_does_not_import_what_keeps_a_run_alive():
    decides = {room(path) for path in code.closure(ROOT / "tinygpt/train/trainer.py") if room(path) != "__init__"}
    assert decides == {"model", "train"}


def test_every_stage_is_a_script_of_its_name_and_has_a_description():
    assert sorted(PIPELINE["stages"]) == STAGES
    for name, stage in PIPELINE["stages"].items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert stage["desc"]
        source = (ROOT / f"stages/{name}.py").read_text()
        assert len(source.splitlines()) <= 80
        assert source.endswith('\n\nif __name__ == "__main__":\n    run_stage(run)\n')  # or it ignores arguments
    assert "${" not in (ROOT / "dvc.yaml").read_text()
    assert PIPELINE["stages"]["code"]["outs"] == [{str(paths.CODE): {"cache": False, "persist": True}}]  # it may fail


def test_stages_track_every_group_that_they_read_except_runtime():
    classes = {params_class(target).__name__: group for group, target in params.GROUPS.items()}
    for name, stage in PIPELINE["stages"].items():
        source = (ROOT / f"stages/{name}.py").read_text()
        calls = re.findall(r"load_params\(([\w, ]+), path=", source)
        read = {classes[cls] for call in calls for cls in re.split(r",\s*", call)}
        read |= set(params.GROUPS) if name == "report" else set()  # shows all params of the file
        untracked = {"runtime"}
        assert {group for group in stage.get("params", []) if isinstance(group, str)} == read - untracked, name


def test_no_output_of_a_stage_is_lost_by_both_git_and_dvc():
    ignored = (ROOT / ".gitignore").read_text()
    for stage in PIPELINE["stages"].values():
        for out in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            is_ignored = path.startswith("data/") or f"/{path}" in ignored or f"/{path}/" in ignored
            assert is_ignored == options.get("cache", True), f"{path}: cached and ignored by git, or neither"


def params_class(target: str) -> type:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def test_every_key_of_params_yaml_is_a_field_and_every_field_a_key():
    document = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    assert list(document) == list(params.GROUPS)
    for group, target in params.GROUPS.items():
        cls = params_class(target)
        assert cls.group == group
        assert list(document[group]) == [field.name for field in dataclasses.fields(cls)], group
    params.check_params(ROOT / "params.yaml")


def test_a_config_in_python_has_the_defaults_of_params_yaml_which_must_name_them_all():
    document = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    given = params.from_mapping(ModelParams, document["model"])
    assert config.GPTConfig() == config.GPTConfig(
        **config.config_fields(given), vocab_size=document["tokenizer"]["vocab_size"]
    )
    del document["model"]["n_layer"]
    with pytest.raises(params.ParamsError, match="missing key n_layer"):
        params.from_mapping(ModelParams, document["model"])


@pytest.mark.parametrize(
    ("cls", "field", "registry"),
    [
        (ModelParams, "norm", layers.NORMS),
        (ModelParams, "mlp", config.MLPS),
        (ModelParams, "attention", attention.ATTENTION),
        (TrainParams, "optimizer", optim.OPTIMIZERS),
        (TrainParams, "schedule", schedules.SCHEDULES),
        (TrainParams, "precision", {"auto", *loss.PRECISIONS}),
        (RuntimeParams, "parallel", parallel.PARALLEL),
        (RuntimeParams, "engine", shards.ENGINES),
        (TokenizerParams, "kind", kinds.TOKENIZERS),
    ],
)
def test_choices_are_the_keys_of_their_registry(cls, field, registry):
    assert set(typing.get_args(typing.get_type_hints(cls)[field])) == set(registry)


def test_data_rooms_and_reports_need_no_torch():
    code = (
        "import sys; import stages.download, stages.clean, stages.train_tokenizer, stages.encode, stages.plot;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_params_are_checked_without_slow_imports():
    code = (
        "import sys; from tinygpt.params import check_params; check_params();"
        "sys.exit(' '.join({'torch', 'pandas', 'matplotlib'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_package_files_have_no_code():
    for path in LIBRARY:
        if path.name == "__init__.py":
            allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
            assert all(isinstance(node, allowed) for node in tree(path).body), path


def test_every_public_name_has_a_docstring():
    for path in [*LIBRARY, *(ROOT / "stages").glob("*.py")]:
        assert ast.get_docstring(tree(path)), path
        for node in tree(path).body:
            overload = any(getattr(d, "id", "") == "overload" for d in getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not overload:
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_files_and_functions_stay_short():
    for path in LIBRARY:
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (35 if node.name == "forward" else 60), f"{path}: {node.name} has {length} lines"


def test_nothing_is_pickled_or_executed_from_outside():
    for path in LIBRARY:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in {"eval", "exec", "compile", "__import__"}, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", "") or "", *(alias.name for alias in node.names)}
                assert not names & {"pickle", "marshal", "shelve"}, path


def n_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_readme_is_short_and_gives_the_size_of_the_library_and_of_the_files_to_read():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    total = f"{round(sum(map(n_lines, LIBRARY)), -2):,}"
    assert re.findall(r"in (\d+) files\s+and ([\d,]+) lines", readme) == [(str(len(LIBRARY)), total)]
    assert re.findall(r"Python, lines \| ([\d,]+)", readme) == [total]
    to_read = re.findall(r"^\| `(tinygpt/\S+)` \| (\d+) \|", readme, re.MULTILINE)
    assert len(to_read) == 10
    assert to_read == [(path, str(n_lines(ROOT / path))) for path, _ in to_read]


def test_dvc_shows_at_most_ten_metrics():
    metrics = [json.loads(path.read_text()) for path in (ROOT / "reports/metrics").glob("*.json")]
    assert 0 < sum(map(len, metrics)) <= 10
