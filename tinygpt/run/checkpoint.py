"""Checkpoints: everything a run needs to continue as if it had never been interrupted.

    runs/<fingerprint>/
        lock                             held by the one trainer that may write here
        run.json                         how many steps it will do, and whether its results are published
        step-0000500/
            weights.safetensors          the model after 500 steps
            optimizer.safetensors
            best.safetensors             the weights with the lowest validation loss so far
            ema.safetensors              the average of the weights; empty if there is none
            state.json                   the step, the curve so far, and checksums of it all

The folder is not a DVC output: DVC deletes outputs before it runs a stage, and `dvc exp run` restores old ones.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from torch import Tensor

from tinygpt.code import code_of, version_of
from tinygpt.errors import UserError, printable
from tinygpt.files import atomic_folder, runs_folder, sha256_file, sha256_json, write_json
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.weights import load_tensors, read_shapes, save_tensors
from tinygpt.run.folder import PLAN_FILE, checkpoints_in, read_state, write_state
from tinygpt.tokens import TokensMeta
from tinygpt.train.config import TrainParams
from tinygpt.train.optim import OPTIMIZERS
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
    """The folder of one run; use it as a context manager, which holds the folder's lock."""

    def __init__(self, name: str, *, runs: Path | None = None) -> None:
        self.folder = (runs or runs_folder()) / name
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another trainer is writing {self.folder}: wait for it, or stop it first") from None
        for partial in self.folder.glob("step-*.partial"):  # left by a killed trainer
            shutil.rmtree(partial)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def note(self, *, max_steps: int, finished: bool) -> None:
        """Record where the run ends, and whether its results are published, for `python -m tinygpt runs`."""
        write_json(self.folder / PLAN_FILE, {"max_steps": max_steps, "finished": finished})

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write one checkpoint of the PARTS, and delete older ones, and later ones, which were damaged."""
        path = self.folder / f"step-{state.step:07d}"
        with atomic_folder(path) as folder:
            for part in PARTS:
                save_tensors(folder / f"{part}{SUFFIX}", tensors[part])
            write_state(folder, dataclasses.asdict(state))
        found = checkpoints_in(self.folder)
        at = found.index(path)
        for other in (*found[: max(0, at + 1 - N_KEPT)], *found[at + 1 :]):
            shutil.rmtree(other)

    def newest_weights(self) -> Path:
        """The file with the weights of the newest checkpoint, or their average if that is what the run evaluates."""
        newest = checkpoints_in(self.folder)[-1]
        averages = newest / f"ema{SUFFIX}"
        return averages if read_shapes(averages) else newest / f"weights{SUFFIX}"

    def load_latest(self) -> tuple[TrainState, dict[str, dict[str, Tensor]]] | None:
        """The newest intact checkpoint, or None; reports damaged ones.  Raises PermissionError if it may not read."""
        found = checkpoints_in(self.folder)
        for folder in reversed(found):
            try:
                state, checksums = read_state(folder)
                for name, checksum in checksums.items():
                    if sha256_file(folder / name) != checksum:
                        raise UserError(f"{name} differs from what was written")
                return TrainState(**state), {part: load_tensors(folder / f"{part}{SUFFIX}") for part in PARTS}
            except PermissionError:
                raise
            except (UserError, OSError) as error:
                print(f"checkpoint {folder} is damaged ({printable(error)}): using the one before it")
        if found:
            print(f"no checkpoint in {self.folder} is intact: starting from the first step")
        return None
