"""The pipeline: a story of what users do with DVC, in which each step follows the one before, and single stages."""

import json
import re
import shutil
from pathlib import Path

import pytest
from project import BIN, ROOT, commit, dvc, hashes, refused, run, run_stages, set_params, succeed
from ruamel.yaml import YAML

STAGES = ["download", "clean", "train_tokenizer", "encode", "train", "evaluate", "plot", "export", "report"]
REPORTS = {
    *(f"reports/metrics/{name}.json" for name in ("train", "eval")),
    *(f"reports/{name}.csv" for name in ("train", "train_norms")),
}


def ran(output: str) -> list[str]:
    """The stages that DVC ran after `code`, which always runs; in our order, as DVC's may vary."""
    assert "Running stage 'code'" in output
    return [name for name in STAGES if f"Running stage '{name}'" in output]


def cached(output: str) -> list[str]:
    """The stages whose results came from DVC's run cache."""
    return [name for name in STAGES if f"Stage '{name}' is cached" in output]


def outs(folder: Path) -> dict[str, str]:
    """Checksums of what every stage makes, from dvc.lock; reports/train.json has times."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    found = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    del found["reports/train.json"], found["reports/metrics/train.json"]
    return found


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- the story: run this file as a whole ----

story = [pytest.mark.slow, pytest.mark.story]


@pytest.fixture(scope="module")
def clone(done, tmp_path_factory) -> Path:
    """A shallow clone: only git, without a cache, a remote or an identity."""
    folder = tmp_path_factory.mktemp("pipeline") / "clone"
    succeed(f"git clone -q --depth 1 file://{done} {folder}", done)
    return folder


class TestTheStory:
    """The steps of the story."""

    pytestmark = story

    def test_a_shallow_clone_without_cache_remote_or_identity_makes_the_same_bytes(self, clone, done):
        metrics, said = dvc(clone, "metrics show", "repro", HOME=str(clone.parent))
        assert "bpb" in metrics  # the numbers are in git
        assert ran(said) == STAGES
        assert hashes(clone) == hashes(done)
        assert outs(clone) == outs(done)
        commit(clone, "second run")  # only its times differ

    def test_all_outputs_are_made_and_git_tracks_only_what_it_should(self, clone):
        for name in (
            "data/raw/manifest.json",
            "data/clean/train.jsonl",
            "data/tokenizer/tokenizer.json",
            "data/tokens/meta.json",
            "data/model/model.safetensors",
            "data/export/hf/config.json",
            "data/export/gguf/tinygpt-f32.gguf",
            "data/export/gguf/tinygpt-q8_0.gguf",
            "reports/samples.md",
            "reports/plots/loss.svg",
        ):
            assert (clone / name).stat().st_size > 0
        tracked = succeed("git ls-files", clone).split()
        made = {name for name in tracked if name.startswith(("data/", "reports/", "runs/")) or name.endswith(".lock")}
        assert made == {"data/README.md", "dvc.lock", "reports/code.json", *REPORTS}
        assert [name for name in tracked if name.endswith(".gitignore")] == [".dvc/.gitignore", ".gitignore"]
        assert succeed("git status --porcelain", clone) == ""
        report = json.loads((clone / "reports/export.json").read_text())
        assert report["f32"]["wrong_tokens"] == 0
        assert report["f32"]["max_logprob_diff"] < 1e-3

    def test_comments_and_runtime_settings_run_no_stage_and_code_those_whose_results_it_decides(self, clone):
        for path in [*clone.glob("tinygpt/**/*.py"), *clone.glob("stages/*.py")]:
            path.write_text(path.read_text() + "\n# a comment\n")
        set_params(clone, {"runtime.log_every": 7, "runtime.micro_batch_size": 2, "runtime.log_to": ["wandb"]})
        replace(clone / "tinygpt/report/plots.py", "dpi=", "dpi=1 + ")
        assert ran(succeed("dvc repro", clone)) == ["plot"]
        succeed("git checkout -q .", clone)

    def test_an_experiment_runs_train_and_what_follows_and_shows_in_every_diff(self, clone):
        assert ran(succeed("dvc exp run -S model.n_layer=2 -S train.lr=1e-5", clone)) == STAGES[4:]
        params, metrics, table, plots, _ = dvc(
            clone,
            "params diff --json",
            "metrics diff --json",
            "exp show --only-changed --md",
            "plots diff --json",
            "plots show",
        )
        changed = json.loads(params)["params.yaml"]
        assert {key: change["new"] for key, change in changed.items()} == {"model.n_layer": 2, "train.lr": 1e-5}
        assert json.loads(metrics)["reports/metrics/eval.json"]["bpb"]["diff"] != 0
        assert sum(map(len, json.loads(metrics).values())) <= 10
        assert "bpb" in table
        assert "n_layer" in table
        loss = json.loads(plots)["data"]["Loss"][0]
        assert set(loss["revisions"]) == {"HEAD", "workspace"}
        drawn = {(row["field"], row["rev"]) for row in loss["content"]["data"]["values"]}
        assert drawn == {(field, rev) for field in ("train_loss", "val_loss") for rev in ("HEAD", "workspace")}
        page = (clone / "dvc_plots/index.html").read_text()
        assert "datum['dvc_inferred_y_value'] !== ''" in page  # otherwise a missing validation loss is drawn as 0
        assert "reports_plots_loss.svg" in page and "gradient norm" in page
        changed_files = {line[3:] for line in succeed("git status --porcelain", clone).splitlines()}
        assert changed_files <= {"dvc.lock", "params.yaml", *REPORTS}

    def test_going_back_to_old_params_runs_no_stage(self, clone):
        succeed("git checkout -q params.yaml", clone)
        back = succeed("dvc repro", clone)
        assert (ran(back), cached(back)) == ([], STAGES[4:])
        assert succeed("git status --porcelain", clone).strip() == ""

    def test_a_typo_in_an_experiment_runs_nothing(self, clone):
        failed = run("dvc exp run -S model.n_layr=2", clone)
        assert failed.returncode != 0
        assert "Could not override 'model.n_layr'" in failed.stdout
        assert "Running" not in failed.stdout

    def test_results_are_shared_through_a_folder(self, clone):
        other, add = clone.parent / "other", f"remote add -q --local -d store {clone.parent / 'store'}"
        succeed(f"git clone -q {clone} {other}", clone)
        dvc(clone, add, "push -q")
        *_, said = dvc(other, add, "pull -q", "repro")
        assert hashes(other) == hashes(clone)
        assert ran(said) == []

    def test_an_imported_model_runs_the_tokenizer_and_train_and_a_promoted_one_train(self, clone, command, monkeypatch):
        monkeypatch.chdir(clone)
        assert command("import-hf", "data/export/hf").returncode == 0
        assert command("preset", "base").returncode == 0
        gentle = {"train.lr": 1e-3, "train.embedding_lr": 1e-3}
        set_params(clone, {"train.max_steps": 10, "train.warmup_steps": 5, **gentle})
        assert ran(succeed("dvc repro train", clone)) == ["train_tokenizer", "train"]  # the same tokens as before
        assert command("promote").returncode == 0
        assert "train" in re.findall(r"^(\w+):$", succeed("dvc status", clone), re.MULTILINE)  # another base


# ---- stages alone ----


def test_the_model_and_its_exports_write_the_same(done, command, monkeypatch):
    monkeypatch.chdir(done)
    args = ["generate", "--prompt", "The", "--temperature", "0", "--max-new-tokens", "100", "--engine"]
    texts = [
        command(*args, *engine.split()).stdout
        for engine in (
            "tinygpt",
            "auto --model data/export/hf",
            "llama.cpp",
            "auto --model data/export/gguf/tinygpt-f32.gguf",
        )
    ]
    assert len(texts[0]) > 50
    assert texts == texts[:1] * 4


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_every_kind_of_tokenizer_works_as_far_as_llama_cpp(project, kind):
    set_params(project, {"tokenizer.kind": kind, "tokenizer.special_tokens": ["<|begin|>"], "train.max_steps": 10})
    run_stages("train_tokenizer encode train evaluate export", project)
    report = json.loads((project / "reports/export.json").read_text())
    assert report["f32"]["wrong_tokens"] == 0
    assert report["f32"]["max_logprob_diff"] < 1e-3


def test_a_tokenizer_is_taken_from_a_file_of_the_project(project):
    shutil.copy(project / "data/tokenizer/tokenizer.json", project / "taken.json")
    set_params(project, {"tokenizer.from_file": "taken.json"})
    run_stages("train_tokenizer", project)
    assert (project / "data/tokenizer/tokenizer.json").read_bytes() == (project / "taken.json").read_bytes()


def test_a_stage_run_by_hand_after_the_tokenizer_alone_has_changed_says_so_in_one_line(project):
    set_params(project, {"tokenizer.vocab_size": 300})
    run_stages("train_tokenizer", project)
    said = {
        "train": "data/tokens was not made with the tokenizer in data/tokenizer: run `dvc repro encode`",
        "evaluate": "data/model was not trained with the tokenizer in data/tokenizer",
        "export": "data/model was not trained with the tokenizer in data/tokenizer",
    }
    for stage, message in said.items():
        assert refused(stage, project).startswith(message)
        assert len(refused(stage, project).splitlines()) == 1
    run_stages("encode", project)
    assert refused("evaluate", project).startswith(said["evaluate"])


def test_without_git_make_repro_says_what_to_do(tmp_path):
    (tmp_path / "zip").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path / "zip")
    venv = tmp_path / "zip/.venv"
    venv.mkdir()
    (tmp_path / "zip/requirements.txt").touch()
    (venv / "bin").symlink_to(BIN)
    (venv / "requirements.installed").touch()
    failed = run("make repro", tmp_path / "zip", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert failed.returncode != 0
    assert "DVC needs a git repository, and git says here: fatal: not a git repository" in failed.stdout
    assert "A ZIP download? Clone it, or run:  git init && git add . && git commit" in failed.stdout
