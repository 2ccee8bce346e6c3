"""The folder data/base: a model and its tokenizer to go on from, and a preset of the params that fit them."""

from __future__ import annotations

import io
from pathlib import Path

from ruamel.yaml import YAML
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, sha256_file
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.weights import save_model
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

BASE_DIR = Path("data/base")  # where training looks for it
PRESET_FILE = "preset.yaml"


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
    if folder == BASE_DIR:
        return "`python -m tinygpt preset base` sets params.yaml to go on from them"
    return f"`python -m tinygpt generate --model {folder} --tokenizer {folder}` writes with them"
