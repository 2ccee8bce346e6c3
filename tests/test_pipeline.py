"""The pipeline as DVC's users run it."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock
from project import BIN, ROOT, commit, environment, made_once, make_project, run, run_stages, set_params, succeed
from ruamel.yaml import YAML
from test_resume import STEPS, hashes, newest_step, undisturbed  # noqa: F401  a project that was trained in one go

pytestmark = pytest.mark.slow

STAGES = ["download", "clean", "train_tokenizer", "encode", "train", "evaluate", "plot", "export"]
METRICS = {
    f"reports/{name}"
    for name in ("clean.json", "train.json", "train.csv", "train_norms.csv", "eval.json", "export.json")
}


def ran(output: str) -> list[str]:
    """The stages that DVC ran, in our order: its own differs where one does not need the other."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


def cached(output: str) -> list[str]:
    """The stages whose results DVC took from its run cache."""
    return [name for name in STAGES if f"Stage '{name}' is cached" in output]


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    """A project after `dvc repro`, all of it committed."""

    def make(folder: Path) -> None:
        make_project(folder)
        assert ran(succeed("dvc repro", folder)) == STAGES
        commit(folder, "first run")

    return made_once(tmp_path_factory.getbasetemp(), "done", make)


@pytest.fixture
def project(done, tmp_path) -> Path:
    """A copy of it, cache and all."""
    shutil.copytree(done, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def test_everything_is_made_and_git_has_only_what_it_should(done):
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
        assert (done / name).stat().st_size > 0
    tracked = succeed("git ls-files", done).split()
    made = {name for name in tracked if name.startswith(("data/", "reports/", "runs/")) or name.endswith(".lock")}
    assert made == {"data/README.md", "data/base/README.md", "dvc.lock", *METRICS}
    assert [name for name in tracked if name.endswith(".gitignore")] == [".dvc/.gitignore", ".gitignore"]
    assert succeed("git status --porcelain", done) == ""
    report = json.loads((done / "reports/export.json").read_text())
    assert report["f32"]["wrong_tokens"] == 0
    assert report["f32"]["max_logprob_diff"] < 1e-3


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


def test_again_nothing_runs_and_machine_settings_change_nothing(project):
    set_params(project, {"runtime.log_every": 7, "runtime.micro_batch_size": 2, "runtime.log_to": ["wandb"]})
    assert ran(succeed("dvc repro", project)) == []


def test_comments_re_run_only_what_they_stand_in(project):
    for name, stage in {"report/plots.py": "plot", "corpus/clean.py": "clean"}.items():
        path = project / "tinygpt" / name
        path.write_text(path.read_text() + "\n# a comment\n")
        assert ran(succeed("dvc repro", project)) == [stage]


def test_an_experiment_runs_train_and_what_follows_and_shows_in_every_diff(project):
    assert ran(succeed("dvc exp run -S model.n_layer=2 -S train.lr=1e-5", project)) == STAGES[4:]
    changed = json.loads(succeed("dvc params diff --json", project))["params.yaml"]
    assert {key: change["new"] for key, change in changed.items()} == {"model.n_layer": 2, "train.lr": 1e-5}
    metrics = json.loads(succeed("dvc metrics diff --json", project))
    assert metrics["reports/eval.json"]["bpb"]["diff"] != 0
    table = succeed("dvc exp show --only-changed --md", project)
    assert "bpb" in table
    assert "n_layer" in table
    loss = json.loads(succeed("dvc plots diff --json", project))["data"]["Loss"][0]
    assert set(loss["revisions"]) == {"HEAD", "workspace"}
    drawn = {(row["field"], row["rev"]) for row in loss["content"]["data"]["values"]}
    assert drawn == {(field, rev) for field in ("train_loss", "val_loss") for rev in ("HEAD", "workspace")}
    succeed("dvc plots show", project)
    assert "val_loss" in (project / "dvc_plots/index.html").read_text()
    assert {line[3:] for line in succeed("git status --porcelain", project).splitlines()} <= {
        "dvc.lock",
        "params.yaml",
        *METRICS,
    }

    succeed("git checkout -q params.yaml", project)
    back = succeed("dvc repro", project)
    assert (ran(back), cached(back)) == ([], STAGES[4:])  # all of it is known from before
    assert succeed("git status --porcelain", project).strip() == ""


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_every_kind_of_tokenizer_goes_through_to_llama_cpp(project, kind):
    set_params(project, {"tokenizer.kind": kind, "tokenizer.special_tokens": ["<|begin|>"], "train.max_steps": 10})
    run_stages("train_tokenizer encode train evaluate export", project)
    report = json.loads((project / "reports/export.json").read_text())
    assert report["f32"]["wrong_tokens"] == 0
    assert report["f32"]["max_logprob_diff"] < 1e-3


def test_a_sweep_in_the_queue_leaves_the_folder_alone(project):
    succeed("dvc exp run --queue train -S 'train.lr=1e-5,3e-4'", project)
    succeed("dvc queue start --jobs 2", project)  # returns when the workers have closed its output: at their end
    deadline = time.monotonic() + 120
    while (status := succeed("dvc queue status", project)).count("Success") < 2:
        assert "Failed" not in status, succeed("cat .dvc/tmp/exps/run/*/*.out", project)
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert succeed("git status --porcelain", project) == ""
    assert "0.0003" in succeed("dvc exp show --only-changed --md", project)
    assert len(list(project.glob("runs/*/lock"))) == 3  # of all of them, in the one folder


def test_results_are_shared_through_a_folder(project, tmp_path):
    other, add = tmp_path / "other", f"dvc remote add -q --local -d store {tmp_path / 'store'}"
    succeed(f"{add} && dvc push -q && git clone -q {project} {other}", project)
    succeed(f"{add} && dvc pull -q", other)
    assert hashes(other) == hashes(project)
    assert ran(succeed("dvc repro", other)) == []


def test_a_shallow_clone_without_cache_remote_or_identity_makes_the_same_bytes(project, tmp_path):
    other = tmp_path / "other"
    succeed(f"git clone -q --depth 1 file://{project} {other}", tmp_path)
    assert "bpb" in succeed("dvc metrics show", other)  # git alone has the numbers
    assert ran(succeed("dvc repro", other, HOME=str(tmp_path))) == STAGES
    assert hashes(other) == hashes(project)
    assert outs(other) == outs(project)


def outs(folder: Path) -> dict[str, str]:
    """Checksums of what every stage makes, from dvc.lock; reports/train.json tells of times."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    found = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    del found["reports/train.json"]
    return found


def test_a_worktree_without_an_identity_runs_experiments(project, tmp_path):
    other = tmp_path / "other"
    succeed(f"git worktree add -q {other}", project)
    assert ran(succeed("dvc exp run encode -S clean.split_seed=1", other, HOME=str(tmp_path))) == STAGES[:4]
    assert (other / "data/tokens/meta.json").exists()


def test_killing_dvc_stops_the_trainer_and_every_way_to_run_goes_on(project, undisturbed, tmp_path):  # noqa: F811
    set_params(project, STEPS)
    commit(project, "longer")
    succeed("git config user.name t && git config user.email t@t", project)  # to run experiments in an edited folder

    for command in ("dvc exp run train", "dvc exp run --temp train", "dvc repro train"):
        before = newest_step(project)
        with open(tmp_path / "log", "w") as log:
            dvc = subprocess.Popen(command.split(), cwd=project, env=environment(), stdout=log, stderr=log)
        while newest_step(project) <= max(before, 40):  # 40: the steps of the first run, which are there
            assert dvc.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        dvc.kill()
        dvc.wait()
        for lock in project.glob("runs/*/lock"):
            with FileLock(lock, timeout=60):  # when it is free, the trainer has gone
                pass
        assert before < newest_step(project) < STEPS["train.max_steps"]
        if command == "dvc exp run train":  # what it leaves behind, and the cure
            assert run("git symbolic-ref -q HEAD", project).returncode == 1
            succeed("git switch -q main", project)
    reached = newest_step(project)
    assert f"going on after step {reached} of {STEPS['train.max_steps']}" in succeed("dvc repro train", project)
    assert hashes(project) == hashes(undisturbed)


def test_a_typo_stops_before_training(project):
    failed = run("dvc exp run -S model.n_layr=2", project)
    assert failed.returncode != 0
    assert "Could not override 'model.n_layr'" in failed.stdout
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("  stride:", "  stirde:"))
    set_params(project, {"train.seed": 2})
    failed = run("dvc repro", project)
    assert failed.returncode != 0
    assert ran(failed.stdout) == ["train"]
    assert "unknown key evaluate.stirde (did you mean evaluate.stride?)" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert "tokens/s" not in failed.stdout


def test_a_stage_run_by_hand_after_the_tokenizer_alone_has_changed_tells_so_in_one_line(project):
    set_params(project, {"tokenizer.vocab_size": 300})
    succeed("python -m stages.train_tokenizer", project)
    told = {
        "train": "data/tokens was not made with the tokenizer in data/tokenizer: run `dvc repro encode`",
        "evaluate": "data/model was not trained with the tokenizer in data/tokenizer",
        "export": "data/model was not trained with the tokenizer in data/tokenizer",
    }
    for stage, message in told.items():
        refused = run(f"python -m stages.{stage}", project)
        assert refused.returncode == 1
        assert refused.stdout.startswith(f"error: {message}")
        assert len(refused.stdout.splitlines()) == 1
    succeed("python -m stages.encode", project)
    assert run("python -m stages.evaluate", project).stdout.startswith(f"error: {told['evaluate']}")


def test_an_export_that_cannot_be_is_refused_before_training(project):
    failed = run("dvc exp run -S model.position=learned", project)
    assert failed.returncode != 0
    assert "no model of transformers and llama.cpp has model.position=learned" in failed.stdout
    assert "tokens/s" not in failed.stdout
    assert "Traceback" not in failed.stdout


def test_a_folder_without_git_is_told_what_to_do(tmp_path):
    (tmp_path / "zip").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path / "zip")
    venv = tmp_path / "zip/.venv"
    venv.mkdir()
    (tmp_path / "zip/requirements.txt").touch()
    (venv / "bin").symlink_to(BIN)
    (venv / "requirements.installed").touch()
    failed = run("make repro", tmp_path / "zip", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert failed.returncode != 0
    assert "no git repository (a ZIP download?)" in failed.stdout
    assert "git init && git add . && git commit" in failed.stdout
