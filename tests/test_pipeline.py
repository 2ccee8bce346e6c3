"""The pipeline as DVC's users run it."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project import BIN, ROOT, commit, environment, make_project, run, set_params, succeed
from test_resume import hashes

pytestmark = pytest.mark.slow

STAGES = ["download", "clean", "train_tokenizer", "encode", "train", "evaluate", "plot", "export"]


def ran(output: str) -> list[str]:
    """The stages that DVC ran."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    """A project after `dvc repro`, all of it committed."""
    folder = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    output = succeed("dvc repro", folder)
    assert sorted(ran(output)) == sorted(STAGES)
    commit(folder, "first run")
    return folder


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
    reports = {f"reports/{name}" for name in ("clean.json", "train.json", "train.csv", "eval.json", "export.json")}
    assert made == {"data/README.md", "dvc.lock", *reports}
    assert [name for name in tracked if name.endswith(".gitignore")] == [".dvc/.gitignore", ".gitignore"]
    assert succeed("git status --porcelain", done) == ""
    report = json.loads((done / "reports/export.json").read_text())
    assert report["f32"]["wrong_tokens"] == 0
    assert report["f32"]["max_logprob_diff"] < 1e-3


def test_again_nothing_runs_and_machine_settings_change_nothing(project):
    set_params(project, {"runtime.log_every": 7, "runtime.micro_batch_size": 2})
    assert ran(succeed("dvc repro", project)) == []


def test_the_same_params_give_the_same_bytes(project):
    before = (project / "dvc.lock").read_text()
    for name in ("runs", ".dvc/cache", "data/model"):
        shutil.rmtree(project / name)
    for name in ("raw", "clean", "tokenizer", "tokens", "export"):
        shutil.rmtree(project / "data" / name)
    shutil.rmtree(project / "reports/plots")
    output = succeed("dvc repro --force", project)
    assert sorted(ran(output)) == sorted(STAGES)
    times = [line for line in before.splitlines() if "train.json" in line]
    assert times

    def outs(text: str) -> list[str]:
        from ruamel.yaml import YAML

        stages = YAML(typ="safe").load(text)["stages"]
        hashed = [out for stage in stages.values() for out in stage["outs"]]
        return [f"{out['path']} {out['md5']}" for out in hashed if out["path"] != "reports/train.json"]

    assert outs((project / "dvc.lock").read_text()) == outs(before)


def test_an_experiment_runs_train_and_what_follows_and_shows_in_every_diff(project):
    output = succeed("dvc exp run -S model.n_layer=2 -S train.lr=1e-5", project)
    assert sorted(ran(output)) == ["evaluate", "export", "plot", "train"]
    params = succeed("dvc params diff", project)
    assert "model.n_layer" in params
    assert "1e-05" in params
    assert "val_loss" in succeed("dvc metrics diff", project)
    shown = json.loads(succeed("dvc exp show --json", project))
    assert len(shown) == 2
    assert "n_layer" in succeed("dvc exp show --only-changed --md", project)
    points = json.loads(succeed("dvc plots diff --json", project))
    text = json.dumps(points)
    assert "train_loss" in text
    assert "val_loss" in text
    assert "HTML" in succeed("dvc plots show", project) or (project / "dvc_plots/index.html").exists()
    # back to the params of before: nothing is computed
    succeed("git checkout -q params.yaml", project)
    back = succeed("dvc repro", project)
    assert "is cached - skipping run" in back
    assert "going on after" not in back
    assert "step " not in back


def test_comments_re_run_only_what_they_stand_in(project):
    for name in ("report/plots.py", "corpus/clean.py"):
        path = project / "tinygpt" / name
        path.write_text(path.read_text() + "\n# a comment\n")
        expected = {"report/plots.py": ["plot"], "corpus/clean.py": ["clean"]}[name]
        assert ran(succeed("dvc repro", project)) == expected


def test_an_experiment_in_a_copy_and_a_sweep_in_the_queue_leave_the_folder_alone(project):
    succeed("dvc exp run --temp -S train.seed=2 -n temporary", project)
    succeed("dvc exp run --queue -S 'train.lr=1e-5,3e-4'", project)
    succeed("dvc queue start --jobs 2", project)
    deadline = time.monotonic() + 240
    while True:
        status = succeed("dvc queue status", project)
        if status.count("Success") == 2:
            break
        assert "Failed" not in status, succeed("dvc queue status; tail -n 50 .dvc/tmp/exps/run/*/*.log", project)
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert succeed("git status --porcelain", project) == ""
    shown = succeed("dvc exp show --only-changed --md", project)
    assert "temporary" in shown
    assert "0.0003" in shown
    assert len(list(project.glob("runs/*/lock"))) == 4  # of all of them, in the one folder


def test_results_are_shared_through_a_folder(project, tmp_path):
    succeed(f"dvc remote add -q --local -d store {tmp_path / 'store'} && dvc push -q", project)
    succeed(f"git clone -q {project} {tmp_path / 'other'}", tmp_path)
    other = tmp_path / "other"
    succeed(f"dvc remote add -q --local -d store {tmp_path / 'store'} && dvc pull -q", other)
    assert (other / "data/model/model.safetensors").read_bytes() == (
        project / "data/model/model.safetensors"
    ).read_bytes()
    assert ran(succeed("dvc repro", other)) == []


@pytest.mark.parametrize("kind", ["shallow", "worktree"])
def test_a_clone_without_a_cache_or_an_identity_makes_it_all_again(project, tmp_path, kind):
    other = tmp_path / "other"
    if kind == "shallow":
        succeed(f"git clone -q --depth 1 file://{project} {other}", tmp_path)
    else:
        succeed(f"git worktree add -q {other}", project)
    shutil.rmtree(project / ".dvc/cache")
    assert json.loads(succeed("dvc metrics show --json", other))
    output = succeed("dvc exp run -S train.max_steps=20", other, HOME=str(tmp_path))
    assert ran(output)[:5] == STAGES[:5]
    assert (other / "data/export/hf/config.json").exists()


def test_killing_dvc_stops_the_trainer_and_either_way_to_run_goes_on(project, tmp_path):
    steps = "-S train.max_steps=400 -S train.save_every=10"
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(project, undisturbed, symlinks=True)
    succeed(f"dvc exp run {steps}", undisturbed)
    for command in (f"dvc exp run {steps}", "dvc repro"):
        process = subprocess.Popen(command.split(), cwd=project, env=environment(), stdout=subprocess.DEVNULL)
        wait_for_new_checkpoint(project, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until_nobody_trains(project)
        succeed(
            "git checkout -q main 2>/dev/null || git switch -q main", project
        )  # a killed `dvc exp run` detaches HEAD
        set_params(project, {"train.max_steps": 400, "train.save_every": 10})
    output = succeed("dvc repro", project)
    assert "going on after step" in output
    assert hashes(project) == hashes(undisturbed)


def wait_for_new_checkpoint(project: Path, process: subprocess.Popen) -> None:
    before = {str(path) for path in project.glob("runs/*/step-*")}
    deadline = time.monotonic() + 120
    while {str(path) for path in project.glob("runs/*/step-*") if path.suffix != ".partial"} <= before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_nobody_trains(project: Path) -> None:
    """No process computes in the project any more."""
    deadline = time.monotonic() + 30
    while True:
        cwds = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if b"stages.train" in (entry / "cmdline").read_bytes():
                    cwds.append((entry / "cwd").readlink())
            except OSError:
                continue
        if project not in cwds:
            return
        assert time.monotonic() < deadline, "the trainer outlived dvc"
        time.sleep(0.05)


def test_a_typo_in_any_group_stops_before_training(project):
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("  stride:", "  stirde:").replace("seed: 1\n  max", "seed: 2\n  max"))
    failed = run("dvc repro train", project)
    assert failed.returncode != 0
    assert "unknown key evaluate.stirde (did you mean evaluate.stride?)" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert "tokens/s" not in failed.stdout


def test_an_export_that_cannot_be_is_refused_before_training(project):
    failed = run("dvc exp run -S model.position=learned", project)
    assert failed.returncode != 0
    assert "cannot be exported: set" in failed.stdout
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
