"""A folder for transformers (https://github.com/huggingface/transformers), written without it.

    AutoModelForCausalLM.from_pretrained("data/export/hf"), AutoTokenizer.from_pretrained("data/export/hf")

load it offline and without remote code. Settings whose default differs between model classes or between transformers
4 and 5 are written out, so that every release reads the same model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tinygpt.errors import UserError
from tinygpt.export.family import check_vocabulary, family_of
from tinygpt.export.hf_families import TRANSFORMERS, HFFamily
from tinygpt.export.layout import apply_layout
from tinygpt.files import atomic_folder, must_exist, write_json
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import load_tensors, model_tensors, save_tensors
from tinygpt.paths import TOKENIZER_FILE
from tinygpt.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"


def export_hf(model: GPT, tokenizer: Tokenizer, tokenizer_dir: str | Path, folder: str | Path) -> tuple[str, int]:
    """Write the folder, whole or not at all; tokenizer.json is copied from `tokenizer_dir` as it is.

    Returns the model_type and the tokens of context, less than the model's where the class knows no window.

    Raises ParamsError when transformers has no class for the model, UserError when the tokenizer is another.
    """
    check_vocabulary(model.config, tokenizer.vocab_size)
    family, n_ctx = family_of(TRANSFORMERS, model.config)
    source = must_exist(Path(tokenizer_dir) / TOKENIZER_FILE, stage="train_tokenizer")
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", model_config(model.config, family, tokenizer, n_ctx))
        write_json(partial / "generation_config.json", _special_ids(tokenizer))
        write_json(partial / "tokenizer_config.json", _tokenizer_config(tokenizer, n_ctx))
        shutil.copyfile(source, partial / TOKENIZER_FILE)
        save_tensors(partial / WEIGHTS_FILE, apply_layout(model_tensors(model), model.config, family.layout, n_ctx))
    return family.name, n_ctx


def model_config(config: GPTConfig, family: HFFamily, tokenizer: Tokenizer, n_ctx: int) -> dict[str, Any]:
    """What transformers reads from config.json."""
    return {
        "architectures": [family.cls],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        **family.config(config, n_ctx),
        family.eps: config.norm_eps,
        "tie_word_embeddings": config.tie_weights,  # the classes disagree on the default
        **_special_ids(tokenizer),
        "use_cache": True,
        "torch_dtype": "float32",  # transformers 5 calls it dtype and reads both
    }


def check_hf(model: GPT, folder: str | Path) -> None:
    """Read the weights back and compare every bit.  Raises UserError that names the first tensor that differs."""
    path = Path(folder) / WEIGHTS_FILE
    family, n_ctx = family_of(TRANSFORMERS, model.config)
    expected = apply_layout(model_tensors(model), model.config, family.layout, n_ctx)
    found = load_tensors(path)
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(found.keys() ^ expected.keys()))
        raise UserError(f"{path} and the model do not hold the same tensors, they differ in {odd}: export it again")
    for name, tensor in expected.items():
        if not torch.equal(tensor.cpu(), found[name]):
            raise UserError(f"{path}: {name} is not the model's: export it again")


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _tokenizer_config(tokenizer: Tokenizer, n_ctx: int) -> dict[str, Any]:
    names: dict[int | None, str] = {id: name for name, id in tokenizer.special_tokens.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the model's own class would rebuild the pre-tokenizer
        "model_max_length": n_ctx,
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names.get(tokenizer.pad_id),
        "unk_token": names.get(tokenizer.unk_id),
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
