"""Which changes of the code change the result of a stage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, succeed

from stages.code import lost_experiments
from tinygpt import code
from tinygpt.files import read_json
from tinygpt.paths import CODE


def forget() -> None:
    """Read the sources again."""
    for cached in (code.code_of, code._read):
        cached.cache_clear()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Iterator[Path]:
    """A copy of the sources; the hashes are computed from it."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("tinygpt", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "ROOT", folder)
        forget()
        yield folder
    forget()


@pytest.fixture(scope="module")
def before(tree) -> dict[str, str]:
    """The hashes of the unchanged copy."""
    return hashes(tree)


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each stage, and of the trainer."""
    code.code_of.cache_clear()
    names = [f"stages.{path.stem}" for path in sorted((folder / "stages").glob("[a-z]*.py"))]
    return {name: code.code_of(name) for name in [*names, "tinygpt.train.trainer"]}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name.removeprefix("stages.") for name in before if before[name] != after[name]}


def test_comments_docstrings_and_layout_do_not_count(tree, before):
    whole = {path: path.read_text() for path in tree.rglob("*.py")}
    for path in whole:
        path.write_text(f'"""Another docstring."""\n\n\n# a comment\n{path.read_text()}'.replace("\n\n\n", "\n\n"))
        first = path.read_text().index('"""', 25)
        if path.read_text()[25:first].strip() == "# a comment":  # the old docstring, which no longer counts as one
            text = path.read_text()
            path.write_text(text[:first] + text[text.index('"""', first + 3) + 3 :])
    forget()
    assert changed(before, hashes(tree)) == set()
    for path, text in whole.items():
        path.write_text(text)


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("corpus/split.py", "return", "return 0 or", {"clean"}),
        ("report/plots.py", "dpi=", "dpi=1 + ", {"plot"}),
        ("model/attention.py", "is_causal=mask is None", "is_causal=False", {"train", "evaluate", "export", "trainer"}),
        ("train/loss.py", "1 - smoothing", "2 - smoothing", {"train", "trainer"}),
        ("report/training.py", ":.8g", ":.7g", {"train"}),
        ("generate/sampling.py", "/ temperature", "/ temperature / 3", {"evaluate"}),
        ("run/loggers.py", 'PROJECT = "tinygpt"', 'PROJECT = "mine"', set()),
        ("run/processes.py", "signal.SIGTERM", "signal.SIGINT", set()),
        ("progress.py", "10.0", "9.0", set()),
        ("code.py", "hexdigest()[:16]", "hexdigest()[:15]", set()),
        ("cli/main.py", 'action="append"', 'action="store"', set()),
    ],
)
def test_a_change_counts_for_those_whose_results_it_decides(tree, before, file, old, new, stages, monkeypatch):
    path = tree / "tinygpt" / file
    text = path.read_text()
    assert old in text
    for name in ("_read",):  # only this file is read again
        known = getattr(code, name)
        monkeypatch.setattr(
            code, name, lambda asked, known=known: known.__wrapped__(asked) if asked == path else known(asked)
        )
    path.write_text(text.replace(old, new, 1))
    try:
        assert {name.removeprefix("tinygpt.train.") for name in changed(before, hashes(tree))} == stages
    finally:
        path.write_text(text)


def test_versions_of_python_and_of_pinned_packages_count_where_they_are_imported(tree, before, monkeypatch):
    assert "python=" in before["stages.download"] and "torch=" not in before["stages.download"]
    original = code.version
    monkeypatch.setattr(code, "version", lambda name: "9.9.9" if name == "torch" else original(name))
    assert changed(before, hashes(tree)) == {"train", "evaluate", "export", "tinygpt.train.trainer"}
    monkeypatch.setattr(code, "version", lambda name: original(name) + ("+cu130" if name == "torch" else ""))
    assert changed(before, hashes(tree)) == set()  # only another build of torch
    monkeypatch.setattr(code.platform, "python_version_tuple", lambda: ("3", "99", "0"))
    assert changed(before, hashes(tree)) == {name.removeprefix("stages.") for name in before}


def test_the_stage_writes_what_dvc_compares(tmp_path):
    import stages.code

    shutil.copy(ROOT / "params.yaml", tmp_path)  # the stage checks it
    stages.code.run(tmp_path)
    written = read_json(tmp_path / CODE, stage="code")
    stages = "base clean download encode evaluate export plot report train train_tokenizer"
    assert sorted(written) == stages.split()
    assert written["train"] == code.code_of("stages.train")
    assert len(set(written.values())) == 10


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "für"])
def test_a_path_that_dvc_takes_for_an_address_is_warned_of(name):
    (warning,) = lost_experiments(Path("/texts") / name, is_copy=False)
    assert f'fail in the folder "/texts/{name}": rename it' in warning


def test_a_shallow_clone_of_which_dvc_keeps_no_experiment_is_warned_of(tmp_path):
    whole, shallow = tmp_path / "it's (a) whole, [one] & more", tmp_path / "shallow"
    git = "git -c user.name=t -c user.email=t@t"
    succeed(f'{git} init -q "{whole}" && cd "{whole}" && {git} commit -q --allow-empty -m a', tmp_path)
    succeed(f'cd "{whole}" && {git} commit -q --allow-empty -m b', tmp_path)
    succeed(f'git clone -q --depth 1 "file://{whole}" shallow', tmp_path)
    (warning,) = lost_experiments(shallow, is_copy=True)
    assert "the clone is shallow: run `git fetch --unshallow`" in warning
    assert lost_experiments(shallow, is_copy=False) == lost_experiments(whole, is_copy=True) == []
