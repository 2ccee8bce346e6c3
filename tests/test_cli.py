"""The command line as its users meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model

from tinygpt.model.weights import model_tensors, save_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model()
    save_model(folder / "model", model.config, model_tensors(model))
    tiny_tokenizer.save(folder / "tokenizer")
    return ["--model", str(folder / "model"), "--tokenizer", str(folder / "tokenizer")]


def run(*args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinygpt", *args]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_generate_prints_the_prompt_and_goes_on_and_a_seed_repeats_it(folders):
    first, second = (run("generate", "--prompt", "the", "--max-new-tokens", "20", *folders) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the")
    assert len(first.stdout) > 5
    assert first.stdout == second.stdout


def test_chat_answers_each_line_and_ends_with_the_input(folders):
    done = run("chat", "--max-new-tokens", "5", *folders, text="the file\n\nagain\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_all_wrong_options_are_told_at_once_in_one_line_each(folders):
    done = run("generate", "--temperature", "-1", "--top-p", "2", *folders)
    assert done.returncode == 1
    assert "--temperature=-1.0 must be within [0, inf)" in done.stderr
    assert "--top-p=2.0 must be within (0, 1]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--model", "nowhere"], "nowhere/config.json not found: run `dvc repro train`"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["generate", "--max-new-tokens", "x"], "invalid int value"),
        (["sing"], "invalid choice: 'sing'"),
        ([], "required"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(args, message):
    done = run(*args)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tokenizer_of_another_run_is_refused(folders, tmp_path):
    path = Path(folders[3]) / "tokenizer.json"
    document = json.loads(path.read_text())
    *merges, last = document["model"]["merges"]
    document["model"]["merges"] = merges
    del document["model"]["vocab"]["".join(last)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    done = run("generate", *folders[:2], "--tokenizer", str(tmp_path))
    assert done.returncode == 1
    assert "they are of different runs" in done.stderr


def test_a_reader_that_goes_away_is_no_error(folders):
    command = f"{sys.executable} -m tinygpt generate --max-new-tokens 2000 {' '.join(folders)} | head -c 10"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.stderr == b""
