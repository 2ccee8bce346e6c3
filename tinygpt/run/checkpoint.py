"""Checkpoints: everything a run needs to continue as if it had never been interrupted.

    runs/<fingerprint>/
        lock                             held by the one trainer that may write here
        run.json                         how many steps it will do, and whether its results are published
        step-0000500/
            weights.safetensors          the model after 500 steps
            optimizer.safetensors
            best.safetensors             the weights with the lowest validation loss so far
            ema.safetensors              the average of the weights, if there is one
            state.json                   the step, the curve so far, and checksums of it all

Processes that each have only a part of every weight write their parts of weights, optimizer and ema to files of their
own: weights/shard-00001-….safetensors and so on.

The folder is not a DVC output: DVC deletes outputs before it runs a stage, and `dvc exp run` restores old ones.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from tinygpt.code import code_of, version_of
from tinygpt.errors import UserError, printable
from tinygpt.files import atomic_folder, runs_folder, sha256_file, sha256_json, write_json
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.weights import load_tensors, save_tensors
from tinygpt.run.folder import PLAN_FILE, read_state, write_state
from tinygpt.tokens import TokensMeta
from tinygpt.train.config import TrainParams
from tinygpt.train.optim import OPTIMIZERS
from tinygpt.train.parallel import ALONE, World, is_split
from tinygpt.train.trainer import TrainState

N_KEPT = 2  # checkpoints: the newest, and the one before it in case the disk has lost part of the newest
PARTS = ("weights", "optimizer", "best", "ema")
SUFFIX = ".safetensors"
CODE = ("tinygpt.train.first_weights", "tinygpt.train.trainer")  # these and what they import decide the trained weights


def fingerprint(config: GPTConfig, params: TrainParams, tokens: TokensMeta, base: str | None = None) -> str:
    """A name for a run by everything that decides its weights: params, tokens, code, and the packages that compute.

    `base` is the SHA-256 of the weights that it starts from, or None if it starts from scratch.
    """
    data = {"train": tokens.train.sha256, "val": tokens.val.sha256, "tokenizer": tokens.tokenizer_sha256, "base": base}
    inputs = {
        "model": config_fields(config),
        "train": dataclasses.asdict(params),
        "data": data,
        "code": [code_of(module) for module in CODE],
        "package": version_of(package) if (package := OPTIMIZERS[params.optimizer].package) else None,
    }
    return sha256_json(inputs)[:16]


class Checkpoints:
    """The folder of one run; use it as a context manager, which holds the folder's lock.

    With several processes, the first takes the lock, each writes what only it has, and all read; their machines must
    share the folder.
    """

    def __init__(self, name: str, world: World = ALONE, *, runs: Path | None = None) -> None:
        self.folder, self.world = (runs or runs_folder()) / name, world
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> Checkpoints:
        self.world.first(self._open)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def note(self, *, max_steps: int, finished: bool) -> None:
        """Record where the run ends, and whether its results are published, for `python -m tinygpt runs`."""
        plan = {"max_steps": max_steps, "finished": finished}
        self.world.first(lambda: write_json(self.folder / PLAN_FILE, plan))

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write one checkpoint of the PARTS, and delete the oldest."""
        with ExitStack() as writing:
            place = atomic_folder(self.folder / f"step-{state.step:07d}")
            folder = self.world.first(lambda: writing.enter_context(place))
            for part in PARTS:
                self._write_part(folder / part, tensors[part])
            self.world.first(lambda: write_state(folder, dataclasses.asdict(state), SUFFIX))
            self.world.first(writing.close)
        self.world.first(self._drop_old)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another trainer is writing {self.folder}: wait for it, or stop it first") from None
        for partial in self.folder.glob("step-*.partial"):  # left by a killed trainer
            shutil.rmtree(partial)

    def _write_part(self, path: Path, tensors: dict[str, Tensor]) -> None:
        if any(map(is_split, tensors.values())):
            save_split(path, tensors)
            self.world.first(lambda: check_split(path, tensors))
        else:
            self.world.first(lambda: save_tensors(path.with_suffix(SUFFIX), tensors))

    def _drop_old(self) -> None:
        for old in self._all()[:-N_KEPT]:
            shutil.rmtree(old)

    def newest_weights(self) -> Path | None:
        """The file with the weights of the newest checkpoint; None if they are split over several files."""
        path = self._all()[-1] / f"weights{SUFFIX}"
        return path if path.exists() else None

    def load_latest(self) -> tuple[TrainState, dict[str, dict[str, Tensor]]] | None:
        """The newest intact checkpoint, or None; reports damaged ones.  Raises PermissionError if it may not read."""
        for folder in reversed(self._all()):
            try:
                state, checksums = read_state(folder)
                for name, checksum in checksums.items():
                    if sha256_file(folder / name) != checksum:
                        raise UserError(f"{name} differs from what was written")
                return TrainState(**state), {part: _read_part(folder / part) for part in PARTS}
            except PermissionError:
                raise
            except (UserError, OSError) as error:
                print(f"checkpoint {folder} is damaged ({printable(error)}): using the one before it")
        if self._all():
            print(f"no checkpoint in {self.folder} is intact: starting from the first step")
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")


def _read_part(path: Path) -> dict[str, Tensor]:
    return load_split(path) if path.is_dir() else load_tensors(path.with_suffix(SUFFIX))


def save_split(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's part of tensors, some of them split, to a safetensors file of its own; all must call it.

    Uses https://docs.pytorch.org/docs/stable/distributed.checkpoint.html, whose default format contains a pickle.
    An error in one process is raised in all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: `Exception` misses it
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        if isinstance(first, OSError):
            raise first from None
        raise RuntimeError(str(error)) from None  # it has the other process's traceback


def check_split(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError if the files of `save_split` that this machine sees do not hold the whole tensors."""
    kinds = _kinds(folder)
    for name, tensor in tensors.items():
        chunks = kinds[name].chunks if name in kinds else []
        if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise UserError(f"{folder} lacks a part that another process wrote: the machines must share the folder")


def load_split(folder: Path) -> dict[str, Tensor]:
    """Whole tensors on the CPU, from what any number of processes wrote.  Raises UserError if it cannot be read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in _kinds(folder).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({str(error).splitlines()[0]})") from None
    return tensors


def _kinds(folder: Path) -> dict[str, Any]:
    """The TensorStorageMetadata of each tensor in the files of a folder: its type, size and chunks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
