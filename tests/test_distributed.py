"""Several processes train one model as a single one would, and nothing is lost when one dies."""

import dataclasses
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import RUNTIME
from project import (
    environment,
    newest_step,
    run_stages,
    set_params,
    start_trainer,
    status_of,
    wait_until,
    workers,
)
from safetensors.torch import load_file, save_file
from test_train import make_learner

from tinygpt.errors import UserError
from tinygpt.params import ParamsError, load_params
from tinygpt.run import processes
from tinygpt.run.processes import open_devices
from tinygpt.run.run import Run
from tinygpt.train.config import ContextWarmup, EMAParams, LoRAParams, TrainParams
from tinygpt.train.parallel import ALONE, World
from tinygpt.train.trainer import Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARAMS = dataclasses.replace(
    load_params(TrainParams, path=ROOT / "params.yaml"),
    max_steps=6,
    batch_size=6,
    warmup_steps=2,
    eval_every=3,
    eval_tokens=700,
    save_every=4,
    sample_tokens=0,
)
WARMUP = {
    "batch_size": 12,
    "context_warmup": ContextWarmup(start=16, steps=5),
    "shuffle_documents": True,
}
LORA = LoRAParams(rank=2, alpha=4, dropout=0.0, targets=None)
RUNS = {  # changes of train, of the model and of runtime
    "muon": ({}, {}, {}),
    "adamw, tied, ema": (
        {"optimizer": "adamw", "lr": 1e-3, "embedding_lr": None, "ema": EMAParams(decay=0.5, start=2)},
        {"tie_weights": True},
        {},
    ),
    "one sequence to evaluate on": ({"eval_tokens": 1}, {}, {}),
    "lora": ({"lora": LORA, "init_from": "base"}, {"tie_weights": False}, {}),
    "lion, warmup, micro-batches, recomputed": (
        {"optimizer": "lion", "lr": 1e-4, "embedding_lr": None, **WARMUP},
        {},
        {"micro_batch_size": 2, "gradient_checkpointing": True},
    ),
}


RUNS_OF = {  # by the number of processes, whose start takes most of the time, and by how they share the model
    2: {
        "ddp": list(RUNS),
        "fsdp": [kind for kind in RUNS if kind != "one sequence to evaluate on"],  # the same code as in ddp
    },
    3: {"ddp": ["muon"], "fsdp": ["muon", "adamw, tied, ema"]},
}
CUT = {2: 2, 3: 1}  # how many of these runs are cut off and resumed


def tokens(n: int) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 40, n).cumsum() % 300
    return np.array([*ids, ids[0]], np.uint16)


def train(name: str, world: World, parallel: str, kind: str) -> dict[str, torch.Tensor]:
    """Train one of the RUNS; returns its last weights."""
    of_train, of_model, of_runtime = RUNS[kind]
    torch.set_num_threads(1)
    params, runtime = (
        dataclasses.replace(PARAMS, **of_train),
        dataclasses.replace(RUNTIME, parallel=parallel, **of_runtime),
    )
    learner = make_learner(params=params, runtime=runtime, world=world, **of_model)
    with Run(name, learner.config, params, runtime, world=world) as run:
        done = Trainer(learner, train_tokens=tokens(2000), val_tokens=tokens(800)).fit(run)
    rows = [row["val_loss"] for row in done.state.rows if row["val_loss"] is not None]
    return done.last | {f"best {name}": tensor for name, tensor in done.best.items()} | {"rows": torch.tensor(rows)}


def many(rank: int, folder: Path) -> None:
    """What one process does: two train together, then three, as in RUNS_OF; the first CUT runs are cut and resumed."""
    for size in RUNS_OF:
        if rank < size:
            together(World(rank, size, rank, size), folder)


def together(world: World, folder: Path) -> None:
    """What one process of a group does."""
    rank, size = world.rank, world.size
    os.environ["DVC_ROOT"] = str(folder / f"runs{size}")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    found = {}
    for parallel, kinds in RUNS_OF[size].items():
        for kind in kinds:
            found[f"{kind}, {parallel}"] = train(f"{kind} {parallel}", world, parallel, kind)
        for kind in kinds[: CUT[size]]:
            newest = folder / f"runs{size}/runs/{kind} {parallel}/step-0000006"
            world.first(lambda newest=newest: shutil.rmtree(newest))
            found[f"resumed {kind}, {parallel}"] = train(f"{kind} {parallel}", world, parallel, kind)
    os.environ["DVC_ROOT"] = str(folder / f"runs{size} of process {rank}") if rank else os.environ["DVC_ROOT"]
    with pytest.raises(UserError, match="the processes do not find the same checkpoint: all must share .*/runs/muon"):
        train("muon ddp", world, "ddp", "muon")
    os.environ["DVC_ROOT"] = str(folder / f"runs{size}")
    if size == 2:
        whole, name = folder / "runs2/runs/muon ddp/step-0000004", "from a whole checkpoint"
        world.first(lambda: shutil.copytree(whole, folder / f"runs2/runs/{name}/step-0000004"))
        found[name] = train(name, world, "fsdp", "muon")
    with pytest.raises(UserError, match="no room"):
        world.first(lambda: (_ for _ in ()).throw(UserError("no room")))
    if rank == 0:
        flat = {f"{kind}/{name}": tensor for kind, tensors in found.items() for name, tensor in tensors.items()}
        save_file({name: tensor.clone() for name, tensor in flat.items()}, folder / f"{size}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The last weights of each run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("alone")))
        return {kind: train(kind, ALONE, "ddp", kind) for kind in RUNS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two and three processes have trained together."""
    folder = tmp_path_factory.mktemp("together")
    workers()
    mp.start_processes(many, (folder,), nprocs=max(RUNS_OF), start_method="forkserver")
    return folder


@pytest.mark.parametrize("size", RUNS_OF)
def test_processes_train_the_model_that_one_trains_and_resume_to_the_same_bits(
    size, alone, trained, tmp_path, monkeypatch
):
    found = load_file(trained / f"{size}.safetensors")
    for parallel, kinds in RUNS_OF[size].items():
        for kind in kinds:
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(found[f"{kind}, {parallel}/{name}"], tensor, atol=2e-3, rtol=1e-3)
        for kind in kinds[: CUT[size]]:
            for name in alone[kind]:
                assert torch.equal(found[f"resumed {kind}, {parallel}/{name}"], found[f"{kind}, {parallel}/{name}"])
    for name, tensor in alone["muon"].items() if size == 2 else ():
        torch.testing.assert_close(found[f"from a whole checkpoint/{name}"], tensor, atol=2e-3, rtol=1e-3)
    runs = trained / f"runs{size}/runs"
    monkeypatch.setenv("DVC_ROOT", str(runs.parent))  # and one process continues where they stopped
    for parallel in ("ddp", "fsdp"):
        shutil.rmtree(runs / f"muon {parallel}/step-0000006")
        for name, tensor in train(f"muon {parallel}", ALONE, "ddp", "muon").items():
            torch.testing.assert_close(tensor, alone["muon"][name], atol=2e-3, rtol=1e-3)


def test_what_processes_cannot_share_is_reported_at_once():
    params = dataclasses.replace(PARAMS, optimizer="adamw8bit", precision="fp16")
    runtime = dataclasses.replace(RUNTIME, parallel="fsdp", micro_batch_size="auto")
    with pytest.raises(ParamsError) as told:
        open_devices(runtime, World(0, 4, 0, 4), params)
    assert told.value.problems == [
        "train.batch_size=6 must be a multiple of the 4 processes that share it: "
        "set train.batch_size or runtime.n_process",
        "train.optimizer=adamw8bit cannot be split among processes: set runtime.parallel=ddp",
        "train.precision=fp16 cannot be split, as each process would scale its own part: set runtime.parallel=ddp",
        "runtime.micro_batch_size=auto works with one process only: give a number",
    ]


def test_cuda_graphs_are_refused_where_they_cannot_be():
    graphs = {"cuda_graphs": True, "compile": True}
    for changed in {"compile": False}, {"n_process": 2}, {"micro_batch_size": 4}, {"micro_batch_size": "auto"}:
        with pytest.raises(ParamsError, match="needs compile=true, n_process=1 and micro_batch_size=null"):
            dataclasses.replace(RUNTIME, **(graphs | changed))
    with pytest.raises(ParamsError, match="cuda_graphs=true works only on a GPU, not on runtime.device=cpu: set it"):
        dataclasses.replace(RUNTIME, device="cpu", **graphs)


# ---- the stage ----

LAST = 90  # the last step


@pytest.fixture
def project(done, tmp_path) -> Path:
    """A project ready to be trained by two processes for some seconds."""
    folder = Path(shutil.copytree(done, tmp_path / "project"))
    shutil.rmtree(folder / "runs")
    often = {"train.save_every": 5, "train.eval_every": 45}
    set_params(folder, {"train.max_steps": LAST, "runtime.n_process": 2, **often})
    return folder


def start_pair(folder: Path, second: Path | None = None) -> list[ForkServerProcess]:
    """Start two processes that train together, as torchrun does; the first writes to train.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "pair"}
    both |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    places = ((folder, "train.log"), (second or folder, "other.log"))
    return [start_trainer(*place, RANK=str(i), LOCAL_RANK=str(i), **both) for i, place in enumerate(places)]


def train_in_pair(folder: Path) -> str:
    """Train in two processes, which must succeed; return the log."""
    pair = start_pair(folder)
    assert [status_of(process) for process in pair] == [0, 0], (folder / "train.log").read_text()
    assert (folder / "other.log").read_text() == ""
    return (folder / "train.log").read_text()


def start(folder: Path, command: str = "") -> subprocess.Popen[bytes]:
    """Start a launcher of two processes: the stage's own, or another."""
    with open(folder / "train.log", "w") as log:
        arguments = [sys.executable, *command.split(), "-m", "stages.train"]
        return subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=log, stderr=log)


def group_of(starter: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes of a launcher."""
    children = psutil.Process(starter.pid).children(recursive=True)
    return [child for child in children if "stages.train" in child.cmdline()]


def test_killed_processes_start_again_all_save_when_asked_to_stop_and_the_model_is_the_same(project, tmp_path):
    shutil.copytree(project, tmp_path / "undisturbed")
    assert train_in_pair(tmp_path / "undisturbed").count("train: lowest validation loss") == 1
    starter = start(project)
    wait_until(lambda: newest_step(project) >= 10, project, seconds=200)
    killed = group_of(starter)
    assert len(killed) == 2
    killed[-1].send_signal(signal.SIGKILL)
    psutil.wait_procs(killed, timeout=100)
    before = newest_step(project)
    wait_until(lambda: newest_step(project) > before, project, seconds=200)
    assert_left_after(signal.SIGINT, starter, project)
    log = (project / "train.log").read_text()
    assert "process 1 was killed by signal 9" in log and "continuing after step" in log
    assert "error: train: another process has ended" in log
    assert "continuing after step" in train_in_pair(project)
    for name in ("data/model/model.safetensors", "data/model/last.safetensors", "reports/train.csv"):
        assert (project / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert json.loads((project / "reports/train.json").read_text())["environment"]["processes"] == 2


def assert_left_after(number: signal.Signals, starter: subprocess.Popen[bytes], folder: Path) -> None:
    """Send a signal to a launcher: its processes save and exit, and so does the launcher."""
    group = group_of(starter)
    starter.send_signal(number)
    assert starter.wait(200) == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(group, timeout=100)
    assert not alive
    log = (folder / "train.log").read_text()
    assert log.count("train: stopped after step") == 1 and "Traceback" not in log


def test_processes_save_and_stop_when_their_starter_dies(project):
    starter = start(project, "-m torch.distributed.run --standalone --nproc-per-node 2")
    wait_until(lambda: newest_step(project) >= 10, project, seconds=200)
    assert_left_after(signal.SIGKILL, starter, project)
    set_params(project, {"runtime.n_process": 1})
    assert "continuing after step" in run_stages("train", project)


@pytest.mark.parametrize(
    ("work", "status"),
    [("sys.exit(int(os.environ['RANK']) and 3)", 3), ("print()", 0), ("os.kill(os.getpid(), 9)", None)],
)
def test_the_starter_ends_with_the_status_of_its_processes_and_gives_up_on_killed_ones(work, status, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", f"import os, sys; {work}"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if status is None:
            with pytest.raises(UserError, match="gave up after 3 restarts: run it again"):
                processes.start(train, dataclasses.replace(RUNTIME, n_process=2))
        else:
            with pytest.raises(SystemExit) as left:
                processes.start(train, dataclasses.replace(RUNTIME, n_process=2))
            assert left.value.code == status
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_split_weights_survive_a_full_disk_and_damage_and_write_texts(project, command, monkeypatch):
    set_params(project, {"runtime.parallel": "fsdp", "train.max_steps": 25})
    pair = start_pair(project)
    wait_until(lambda: newest_step(project) >= 10, project, seconds=200)
    # A limit on file size in the process that writes stands for a full disk; the other process must notice.
    resource.prlimit(pair[0].pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert [status_of(process) for process in pair] == [1, 1]
    log = (project / "train.log").read_text()
    assert log.count("error: no room to write runs/") == 1 and "Traceback" not in log
    assert not list(project.glob("runs/*/*.partial"))
    stopped = newest_step(project)
    weights = max(project.glob(f"runs/*/step-{stopped:07d}/weights.safetensors"))
    *kept, last = weights.read_bytes()
    weights.write_bytes(bytes([*kept, last ^ 1]))
    log = train_in_pair(project)
    assert "(weights.safetensors differs from what was written): using the one before it" in log
    assert f"continuing after step {stopped - 5} of 25" in log
    monkeypatch.chdir(project)
    assert command("generate", "--run", "newest", "--prompt", "The", "--max-new-tokens", 3).stdout.startswith("The")


def test_a_users_mistake_is_one_line_for_all_processes_together(project):
    set_params(project, {"train.batch_size": 3})
    assert [status_of(process) for process in start_pair(project)] == [1, 1]
    assert (project / "train.log").read_text().splitlines() == [
        "error: train.batch_size=3 must be a multiple of the 2 processes that share it: "
        "set train.batch_size or runtime.n_process"
    ]
    assert (project / "other.log").read_text() == ""
    assert not list(project.glob("runs/*/run.json"))  # only a finished run has one


def test_a_training_that_diverges_is_one_line_for_all_processes_together(project):
    set_params(project, {"train.lr": 100, "train.optimizer": "adamw", "train.grad_clip": 1e30, "train.warmup_steps": 0})
    assert [status_of(process) for process in start_pair(project)] == [1, 1]
    last = (project / "train.log").read_text().splitlines()[-1]
    assert re.match(r"error: .* at step \d+: lower train.lr", last), last
    assert "has failed" not in (project / "train.log").read_text()
    assert (project / "other.log").read_text() == ""


def test_a_process_whose_memory_is_full_says_so_though_it_is_not_the_first(monkeypatch):
    def fail(world: World) -> None:
        raise MemoryError

    monkeypatch.setattr(processes, "_join", lambda: World(1, 2, 1, 2))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which nobody reads
    monkeypatch.setattr(sys, "__stderr__", io.StringIO())
    with pytest.raises(MemoryError):
        processes._train_with_others(fail)
    assert sys.__stderr__.getvalue() == "train: process 1 has failed:\n" and sys.stderr is sys.__stderr__


def test_a_process_other_than_the_first_says_why_it_failed(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"  # as on a second machine
    shutil.copytree(project, elsewhere)
    (elsewhere / "data/tokens/val.bin").unlink()
    assert [status_of(process) for process in start_pair(project, elsewhere)] == [1, 1]
    missing = "error: data/tokens/val.bin not found: run `dvc repro encode` to make it\n"
    assert ((project / "train.log").read_text(), (elsewhere / "other.log").read_text()) == (missing, "")
    (project / "data/tokens/train.bin").unlink()
    assert [status_of(process) for process in start_pair(project, elsewhere)] == [1, 1]
    both = (project / "train.log").read_text()
    assert missing.removeprefix("error: ") in both and "data/tokens/train.bin not found" in both
    shutil.copy(elsewhere / "data/tokens/train.bin", project / "data/tokens")
    (project / "data/tokens/val.bin").unlink()
    assert [status_of(process) for process in start_pair(project)] == [1, 1]  # missing for both
    assert ((project / "train.log").read_text(), (project / "other.log").read_text()) == (missing, "")
