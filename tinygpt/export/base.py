"""The folder data/base: a model and its tokenizer to go on from, the params that fit them, and adapters of it."""

from __future__ import annotations

import io
from pathlib import Path

from ruamel.yaml import YAML
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.card import TRAINING_FILE
from tinygpt.export.config import ExportParams
from tinygpt.export.gguf import export_gguf_adapter
from tinygpt.export.hf import PEFT_FILE, export_peft
from tinygpt.files import atomic_write, human_bytes, must_exist, read_json, sha256_file
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.weights import WEIGHTS_FILE, load_tensors, save_model
from tinygpt.paths import BASE
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

PRESET_FILE = "preset.yaml"
ADAPTER_FILE = "adapter.safetensors"


def write_base(folder: Path, config: GPTConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Fill the folder.  Raises UserError when the tokenizer has another number of tokens than the model."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} tokens and its tokenizer.json {tokenizer.vocab_size}: a vocabulary "
            "that was filled up cannot be taken"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    save_model(folder, config, tensors, sha256_file(tokenizer_file(folder)))
    model = {key: value for key, value in config_fields(config).items() if key not in ("vocab_size", "attention")}
    preset = {
        "tokenizer": {"from_file": str(folder / "tokenizer.json"), "special_tokens": []},
        "model": model,
        "train": {"init_from": "base"},
    }
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(preset, text)
    with atomic_write(folder / PRESET_FILE) as file:
        file.write(f"# goes on training the model in {folder}\n{text.getvalue()}")


def use_of(folder: Path) -> str:
    """What a folder that `write_base` has filled can be used for."""
    if folder == BASE:
        return "`python -m tinygpt preset base` sets params.yaml to go on from them"
    return f"`python -m tinygpt generate --model {folder} --tokenizer {folder}` writes with them"


def export_adapters(
    folder: Path, model_dir: Path, base_dir: Path, config: GPTConfig, params: ExportParams
) -> list[str]:
    """Write those of a model that was trained with adapters on their own, for who has the base.

    Returns a line for each file, none for a model without adapters.  Raises UserError when the base is another model.
    """
    training = read_json(model_dir / TRAINING_FILE, stage="train")
    lora = training["lora"]
    if lora is None:
        return []
    base = base_dir / WEIGHTS_FILE
    if not base.exists() or sha256_file(base) != training.get("base_sha256"):
        raise UserError(
            f"{base_dir} is not the model that these adapters were trained on: put that one back, or run `dvc repro "
            "train` to train adapters of this one"
        )
    adapter = load_tensors(must_exist(model_dir / ADAPTER_FILE, stage="train"))
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
