"""A copy of this project with a small corpus and small params, for tests that run whole stages."""

import contextlib
import hashlib
import importlib
import io
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from tinygpt.errors import UserError
from tinygpt.stage import run_stage

ROOT = Path(__file__).parents[1]
TRAINED = (
    *(f"data/model/{name}" for name in ("model.safetensors", "last.safetensors", "config.json")),
    *(f"reports/{name}" for name in ("train.csv", "train_norms.csv", "train_samples.md")),
)
BIN = str(Path(sys.executable).parent)

SMALL = {
    "download.source": "corpus.txt",
    "clean.separator": "\n\n",
    "clean.near_duplicates": None,
    "tokenizer.vocab_size": 320,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 64,
    "train.max_steps": 40,
    "train.batch_size": 4,
    "train.warmup_steps": 5,
    "train.eval_every": 10,
    "train.eval_tokens": 500,
    "train.save_every": 5,
    "train.sample_tokens": 10,
    "evaluate.max_new_tokens": 10,
    "export.gguf": ["f32", "q8_0"],
    "export.check_tokens": 512,
    "plot.formats": ["svg"],
    "runtime.n_thread": 1,
}


def environment(**changes: str) -> dict[str, str]:
    """Our environment with the tests' Python first on PATH, and without this machine's git identity and settings."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "GIT", "PYTEST"))}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return env | {"OMP_NUM_THREADS": "1"} | changes


def run(command: str, folder: Path, *, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a folder; stdout has both streams."""
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeed(command: str, folder: Path, **env: str) -> str:
    """Run a command that must succeed; return what it printed."""
    done = run(command, folder, **env)
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def dvc(folder: Path, *commands: str, **env: str) -> list[str]:
    """Run DVC's commands in one process, which imports it once; return what each prints.  All must succeed."""
    code = "import sys\nfrom dvc.cli import main\n"
    code += "".join(
        f"if main({command.split()}): sys.exit('{command}')\nprint('\\f', flush=True)\n" for command in commands
    )
    (folder.parent / "commands.py").write_text(code)
    return succeed(f"python {folder.parent / 'commands.py'}", folder, **env).split("\f\n")[:-1]


def run_stages(names: str, folder: Path) -> str:
    """Run stages one after the other in this process; return what they printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for name in names.split():
            importlib.import_module(f"stages.{name}").run(folder)
    return printed.getvalue()


def refused(name: str, folder: Path) -> str:
    """Run a stage, in this process, that must fail; return its message, with paths relative to the project."""
    with pytest.raises(UserError) as caught:
        run_stages(name, folder)
    return str(caught.value).replace(f"{folder}/", "")


@cache
def workers() -> ForkServerContext:
    """Processes that do not have to import torch: they are forked from one that has done so, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    # the last two are for several processes that train together: DDP imports the compiler
    context.set_forkserver_preload(["stages.train", "torch._dynamo", "torch.distributed.fsdp"])
    with contextlib.chdir(ROOT):  # it imports from here
        forkserver.ensure_running()
    return context


def start_trainer(folder: Path, log: str = "train.log", **env: str) -> ForkServerProcess:
    """Like `python -m stages.train`, without starting an interpreter; the output goes to a file."""
    return start_stage("train", folder, log, **env)


def start_stage(name: str, folder: Path, log: str, **env: str) -> ForkServerProcess:
    """The same for any stage."""
    process = workers().Process(target=_stage, args=(name, folder, log, environment(**env)), daemon=True)
    process.start()
    return process


def _stage(name: str, folder: Path, log: str, env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [f"stages/{name}.py"]
    run_stage(importlib.import_module(f"stages.{name}").run)


def status_of(process: ForkServerProcess, *, seconds: float = 120) -> int:
    """Wait for a trainer to end; return its exit status, or minus the signal that killed it."""
    process.join(seconds)
    assert process.exitcode is not None, "it goes on"
    return process.exitcode


def wait_until(condition: Callable[[], object], log: Path, *, seconds: float = 120, pause: float = 0.01) -> None:
    """Wait for a condition; on a timeout fail with the content of a log, or of a folder's train.log."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (log / "train.log" if log.is_dir() else log).read_text()
        time.sleep(pause)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all that a training makes except the report, which has the time it took."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TRAINED}


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[5:12]) for path in folder.glob("runs/*/step-*") if not path.suffix), default=0)


def commit(folder: Path, message: str) -> None:
    """Commit everything, with a made-up identity."""
    succeed(f"git add -A && git -c user.name=t -c user.email=t@t commit -qm '{message}'", folder)


def corpus(n_documents: int = 400) -> str:
    """Sentences of made-up words: about 100 kB from which a small model can learn something."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(150)]

    def sentence() -> str:
        return f"The {rng.choice(words)} {rng.choice(words)}s the {rng.choice(words)} naïve {rng.choice(words)}."

    return "\n\n".join(" ".join(sentence() for _ in range(rng.randint(3, 8))) for _ in range(n_documents)) + "\n"


def make_project(folder: Path, changes: Mapping[str, Any] = SMALL) -> Path:
    """Copy the files that git would track into `folder`, add a corpus, change params, and commit all."""
    listed = succeed("git ls-files -co --exclude-standard", ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("reports/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "corpus.txt").write_text(corpus(), encoding="utf-8")
    set_params(folder, changes)
    succeed("git init -q -b main", folder)
    commit(folder, "start")
    return folder


def set_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change values in a folder's params.yaml, by "group.key"."""
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    for name, value in changes.items():
        group, key = name.split(".")
        assert key in document[group], name
        document[group][key] = value
    yaml.dump(document, folder / "params.yaml")


def made_once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, once in a run of the tests: workers of pytest-xdist share it.

    `base` is the worker's temporary folder, tmp_path_factory.getbasetemp().
    """
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / f"{name}.lock"):
        if not (shared / f"{name}.done").exists():
            shutil.rmtree(shared / name, ignore_errors=True)  # another worker may have failed halfway
            make(shared / name)
            (shared / f"{name}.done").touch()
    return shared / name
