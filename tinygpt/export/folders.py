"""Folders with a model and its tokenizer, ours or those of transformers; data/base, and adapters for it."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import torch
from ruamel.yaml import YAML
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.card import TRAINING_FILE, read_training
from tinygpt.export.config import ExportParams
from tinygpt.export.hf import PEFT_FILE, export_peft, read_hf
from tinygpt.files import atomic_folder, human_bytes, must_exist, read_json, sha256_file, write_text
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, trained_tensors
from tinygpt.model.weights import (
    ADAPTER_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    filled_model,
    load_pair,
    read_fitting,
    save_model,
)
from tinygpt.paths import BASE, EXPORT, MODEL, TOKENIZER, TOKENIZER_FILE
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

FOLDER = "a folder with config.json and model.safetensors, from tinygpt or transformers"
PRESET_FILE = "preset.yaml"
MADE_BY = {MODEL: "train", TOKENIZER: "train_tokenizer", EXPORT: "export"}
FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, PRESET_FILE, "README.md"}  # that a new base may replace


def open_model(folder: str | Path, tokenizer: str | Path | None = None) -> tuple[GPT, Tokenizer]:
    """Read a model, in eval mode, and its tokenizer: `model, tokenizer = open_model("data/model")`.

    The folder is one of ours, or one of transformers if its config.json has a model_type. Without `tokenizer`, the
    tokenizer of one of ours is in its folder, or in `tokenizer` next to it. Raises UserError that says what is wrong
    with the files.
    """
    folder = must_be_there(Path(folder))
    if not (folder / CONFIG_FILE).exists():
        if (folder / PEFT_FILE).exists():
            raise UserError(f"{folder} has adapters alone: {MODEL} is the model with them")
        or_file = ", or a .gguf file" if folder.is_dir() else ""
        raise UserError(f"{folder} is not a model: give {FOLDER}{or_file}")
    if "model_type" in read_json(folder / CONFIG_FILE, stage="train"):
        if tokenizer is not None:
            raise UserError(f"{folder} is a transformers folder, which has its own tokenizer: leave {tokenizer} out")
        config, tensors, found_tokenizer = read_hf_pair(folder)
        return filled_model(config, tensors), found_tokenizer
    must_be_there(folder / WEIGHTS_FILE)
    if tokenizer is None:
        tokenizer = tokenizer_of(folder) / TOKENIZER_FILE
        wanted = f"its folder with --tokenizer, or put it into {folder}"
    else:
        wanted = "a folder with tokenizer.json"
    return load_pair(folder, must_be_there(Path(tokenizer), wanted))


def tokenizer_of(folder: Path) -> Path:
    """Where the tokenizer of a model is: in its folder, or in `tokenizer` next to it."""
    named = folder if folder.name not in ("", "..") else folder.resolve()  # "." has no parent
    return folder if (folder / TOKENIZER_FILE).exists() else named.parent / "tokenizer"


def read_hf_pair(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """The config, tensors and tokenizer in a folder of transformers.  Raises UserError that says what is wrong."""
    config, tensors = read_hf(folder)
    if not (folder / TOKENIZER_FILE).exists():
        raise UserError(
            f"{folder / TOKENIZER_FILE} not found: only byte-level BPE from a tokenizer.json can be imported"
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the model has {config.vocab_size} tokens, but its tokenizer.json {tokenizer.vocab_size}: "
            "use files from the same model; a padded vocabulary cannot be imported"
        )
    return config, tensors, tokenizer


def must_be_there(path: Path, wanted: str = FOLDER) -> Path:
    """The path.  Raises UserError if it does not exist, naming the stage that makes it, or else `wanted`."""
    others = sorted(each.name for each in path.parent.glob("*.gguf")) if path.suffix == ".gguf" else []
    if others and path.is_relative_to(EXPORT) and not path.exists():
        raise UserError(
            f"{path} not found: there is {', '.join(others)}, and export.gguf names the types that are made"
        )
    for made, stage in MADE_BY.items():
        if path.is_relative_to(made):
            return must_exist(path, stage=stage)
    if not path.exists():
        raise UserError(f"{path} not found: give {wanted}")
    return path


def write_base(folder: Path, config: GPTConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Replace a base, whole or not at all; DVC tracks data/base.  Raises UserError if the folder holds other files."""
    if others := sorted({path.name for path in folder.glob("*")} - FILES):
        raise UserError(f"{folder} holds {others[0]}, which is not part of a base model: give another folder")
    folder = _short(folder)
    with atomic_folder(folder.absolute()) as partial:
        tokenizer.save(partial)
        save_model(partial, config, tensors, sha256_file(tokenizer_file(partial)))
        write_text(partial / PRESET_FILE, _preset(folder, config))
    if folder == BASE and Path(".dvc").is_dir():
        _record()


def _short(folder: Path) -> Path:
    """BASE for the same folder by another path, which would be recorded nowhere."""
    return BASE if folder.resolve() == BASE.resolve() else folder


def _preset(folder: Path, config: GPTConfig) -> str:
    """A preset: the values of params.yaml that continue training from a base."""
    model = {key: value for key, value in config_fields(config).items() if key not in ("vocab_size", "attention")}
    preset = {
        "tokenizer": {"from_file": str(folder / TOKENIZER_FILE), "special_tokens": []},
        "model": model,
        "train": {"init_from": "base"},
    }
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(preset, text)
    return f"# continues training the model in {folder}\n{text.getvalue()}"


def _record() -> None:
    """Record data/base in dvc.lock: then it travels with experiments, and is pushed and pulled."""
    command = [sys.executable, "-m", "dvc", "commit", "-q", "-f", "base"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "rror" in line), "no reason given")
        raise UserError(f"{BASE} is written, but DVC could not add it ({said}): fix that and run `dvc commit -f base`")


def use_of(folder: Path) -> str:
    """How to use the weights in a folder that `write_base` has filled."""
    if _short(folder) == BASE:
        return "`python -m tinygpt preset base` sets params.yaml to continue from them, `preset lora` to train adapters"
    return f"`python -m tinygpt generate --model {folder} --tokenizer {folder}` generates text with them"


def export_adapters(folder: Path, model_dir: Path, base_dir: Path, model: GPT, params: ExportParams) -> list[str]:
    """Write the adapters of a model on their own, for those who have the base.

    Returns a line for each file, none for a model without adapters.  Raises UserError if the base is not the model that
    they were trained on, or the adapters do not fit the training.
    """
    training = read_training(model_dir)
    if training.lora is None:
        return []
    base = base_dir / WEIGHTS_FILE
    if not base.exists() or sha256_file(base) != training.base_sha256:
        raise UserError(
            f"{base_dir} is not the model that these adapters were trained on: restore it, or run `dvc repro train` to "
            "train adapters for this one"
        )
    from tinygpt.export.gguf import export_gguf_adapter  # here, so that opening a model need not wait for it

    lora = dataclasses.asdict(training.lora)
    with torch.device("meta"):
        adapted = GPT(model.config, init=False)
        add_lora(adapted, **lora, generator=None)
    path = must_exist(model_dir / ADAPTER_FILE, stage="train")
    adapter = read_fitting(path, trained_tensors(adapted), TRAINING_FILE)
    files = []
    if params.hf:
        export_peft(folder / "peft", adapter, model.config, lora)
        files.append(folder / "peft" / PEFT_FILE)
    if params.gguf:
        files.append(folder / "gguf" / "tinygpt-lora.gguf")
        export_gguf_adapter(files[-1], adapter, model.config, lora)
    return [
        f"{file.relative_to(folder)} {human_bytes(file.stat().st_size)}, adapters of rank {lora['rank']} for {BASE}"
        for file in files
    ]
