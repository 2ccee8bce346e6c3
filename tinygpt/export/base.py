"""The folder data/base: a model and its tokenizer to go on from, the params that fit them, and adapters of it."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import torch
from ruamel.yaml import YAML
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.card import TRAINING_FILE, read_training
from tinygpt.export.config import ExportParams
from tinygpt.export.gguf import export_gguf_adapter
from tinygpt.export.hf import PEFT_FILE, export_peft
from tinygpt.files import atomic_folder, atomic_write, human_bytes, must_exist, sha256_file
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.lora import trained_tensors
from tinygpt.model.weights import CONFIG_FILE, WEIGHTS_FILE, read_fitting, save_model
from tinygpt.paths import BASE, TOKENIZER_FILE
from tinygpt.run.costs import build_trained
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

PRESET_FILE = "preset.yaml"
ADAPTER_FILE = "adapter.safetensors"
FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, PRESET_FILE, "README.md"}  # that a base replaces


def write_base(folder: Path, config: GPTConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Put a base in place of the folder, whole or not at all, and let DVC take it where it is the project's own.

    Raises UserError when the tokenizer has another number of tokens than the model, or something else is in the folder.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} tokens and its tokenizer.json {tokenizer.vocab_size}: a vocabulary "
            "that was filled up cannot be taken"
        )
    if others := sorted({path.name for path in folder.glob("*")} - FILES):
        raise UserError(f"{folder} holds {others[0]}, which is not of a base: name another folder, or move it away")
    with atomic_folder(folder.absolute()) as partial:
        tokenizer.save(partial)
        save_model(partial, config, tensors, sha256_file(tokenizer_file(partial)))
        with atomic_write(partial / PRESET_FILE) as file:
            file.write(_preset(folder, config))
    if folder == BASE and Path(".dvc").is_dir():
        _record()


def _preset(folder: Path, config: GPTConfig) -> str:
    """The values of params.yaml that go on from a base."""
    model = {key: value for key, value in config_fields(config).items() if key not in ("vocab_size", "attention")}
    preset = {
        "tokenizer": {"from_file": str(folder / TOKENIZER_FILE), "special_tokens": []},
        "model": model,
        "train": {"init_from": "base"},
    }
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(preset, text)
    return f"# goes on training the model in {folder}\n{text.getvalue()}"


def _record() -> None:
    """Have DVC take data/base: then it is in dvc.lock, goes along with experiments, and is pushed and pulled."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "-q", "base"]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "rror" in line), "no reason given")
        raise UserError(f"{BASE} is written, but DVC has not taken it ({said}): mend that and run `dvc repro base`")


def use_of(folder: Path) -> str:
    """What a folder that `write_base` has filled can be used for."""
    if folder == BASE:
        return "`python -m tinygpt preset base` sets params.yaml to go on from them"
    return f"`python -m tinygpt generate --model {folder} --tokenizer {folder}` writes with them"


def export_adapters(
    folder: Path, model_dir: Path, base_dir: Path, config: GPTConfig, params: ExportParams
) -> list[str]:
    """Write those of a model that was trained with adapters on their own, for who has the base.

    Returns a line for each file, none for a model without adapters.  Raises UserError when the base is another model,
    or the adapters are not those of the training.
    """
    training = read_training(model_dir)
    if training.lora is None:
        return []
    base = base_dir / WEIGHTS_FILE
    if not base.exists() or sha256_file(base) != training.base_sha256:
        raise UserError(
            f"{base_dir} is not the model that these adapters were trained on: put that one back, or run `dvc repro "
            "train` to train adapters of this one"
        )
    lora = dataclasses.asdict(training.lora)
    with torch.device("meta"):
        expected = trained_tensors(build_trained(config, training.lora))
    adapter = read_fitting(must_exist(model_dir / ADAPTER_FILE, stage="train"), expected, TRAINING_FILE)
    files = []
    if params.hf:
        export_peft(folder / "peft", adapter, config, lora)
        files.append(folder / "peft" / PEFT_FILE)
    if params.gguf:
        files.append(folder / "gguf" / "tinygpt-lora.gguf")
        export_gguf_adapter(files[-1], adapter, config, lora)
    return [
        f"{file.relative_to(folder)} {human_bytes(file.stat().st_size)}, adapters of rank {lora['rank']} for {BASE}"
        for file in files
    ]
