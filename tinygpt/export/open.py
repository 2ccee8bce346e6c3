"""Open a model with its tokenizer, whether the folder is one of ours or one that transformers saved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.hf import read_hf
from tinygpt.files import must_exist, read_json
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import CONFIG_FILE, WEIGHTS_FILE, fill, load_pair, unset_model
from tinygpt.paths import MODEL, TOKENIZER_FILE
from tinygpt.tokenizer import Tokenizer, load_tokenizer

FOLDER = "a folder with config.json and model.safetensors, of ours or of transformers"


def open_model(folder: str | Path, tokenizer: str | Path | None = None) -> tuple[GPT, Tokenizer]:
    """Read a model, in eval mode, and its tokenizer: `model, tokenizer = open_model("data/model")`.

    The folder is one of ours, or of transformers where its config.json names a class of theirs. Without `tokenizer` a
    model of ours has it in its folder, or in `tokenizer` next to it. Raises UserError with what is wrong with
    the files.
    """
    folder = must_be_there(Path(folder), stage="train")
    if not (folder / CONFIG_FILE).exists():
        found = sorted(folder.glob("*.gguf"))
        example = f", such as {found[0]}" if found else ""
        raise UserError(f"{folder} is not a model: name {FOLDER}, or a .gguf file{example}")
    if "model_type" in read_json(folder / CONFIG_FILE, stage="train"):
        if tokenizer is not None:
            raise UserError(f"{folder} has its own tokenizer, as transformers saves it: leave {tokenizer} out")
        config, tensors, found_tokenizer = read_hf_pair(folder)
        return fill(unset_model(config), tensors), found_tokenizer
    must_be_there(folder / WEIGHTS_FILE, stage="train")
    if tokenizer is not None:
        must_be_there(Path(tokenizer), stage="train_tokenizer", wanted="a folder with tokenizer.json")
    return load_pair(folder, tokenizer or tokenizer_of(folder))


def tokenizer_of(folder: Path) -> Path:
    """Where a model has its tokenizer: in its folder, or in `tokenizer` next to it."""
    return folder if (folder / TOKENIZER_FILE).exists() else folder.parent / "tokenizer"


def read_hf_pair(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """The config, the tensors and the tokenizer of a folder of transformers.

    Raises UserError with what is wrong with it.
    """
    config, tensors = read_hf(folder)
    if not (folder / TOKENIZER_FILE).exists():
        raise UserError(f"{folder / TOKENIZER_FILE} not found: only byte-level BPE in that form can be taken")
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the model has {config.vocab_size} tokens and its tokenizer.json {tokenizer.vocab_size}: "
            "name two that belong together"
        )
    return config, tensors, tokenizer


def must_be_there(path: Path, *, stage: str, wanted: str = FOLDER) -> Path:
    """The path.  Raises UserError where nothing is there; only what is in data/ is made by a stage."""
    if path.parts[:1] == MODEL.parts[:1]:
        return must_exist(path, stage=stage)
    if not path.exists():
        raise UserError(f"{path} not found: name {wanted}")
    return path
