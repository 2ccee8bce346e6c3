"""The weights that training starts from, where it does not start from its seed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.weights import load_model, model_tensors
from tinygpt.params import yaml_text
from tinygpt.tokenizer import Tokenizer, load_tokenizer

FREE = ("dropout", "attention")  # fields in which the run may differ from its base


def load_base(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The tensors of a base.  Raises UserError when there is none, or it is of another model or tokenizer."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"train.init_from=base, but {folder} holds no model: run `python -m tinygpt import-hf FOLDER` or "
            "`python -m tinygpt promote`, or set it to scratch"
        )
    base, theirs = load_model(folder), load_tokenizer(folder)
    ours = config_fields(config)
    differing = [
        f"model.{key}={yaml_text(ours[key])} there {yaml_text(value)}"
        for key, value in config_fields(base.config).items()
        if key not in (*FREE, "vocab_size") and ours[key] != value
    ]
    if (theirs.tokens, theirs.merges) != (tokenizer.tokens, tokenizer.merges):
        differing.append("data/tokenizer is another tokenizer")
    if differing:
        raise UserError(
            f"{folder} does not fit params.yaml ({'; '.join(differing)}): run `python -m tinygpt preset base`"
        )
    return model_tensors(base)
