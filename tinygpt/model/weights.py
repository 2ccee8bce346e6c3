"""A model on disk: `config.json` and `model.safetensors` (https://huggingface.co/docs/safetensors)."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinygpt.errors import UserError, shown
from tinygpt.files import ANEW, atomic_write, must_exist, read_json, sha256_file, some_of, write_json
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.model.gpt import GPT, TIED
from tinygpt.params import read_record
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokenizer.tokenizer import tokenizer_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter.safetensors"  # adapters alone, which WEIGHTS_FILE has merged
TOKENIZER_KEY = "tokenizer_sha256"  # in config.json: hash of the tokenizer.json that the model was trained with
FREE = ("dropout", "attention")  # fields in which a run may differ from the base that it starts from
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST_SHOWN = 6  # wrong tensors that a message names

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name


def model_tensors(model: GPT) -> dict[str, Tensor]:
    """The tensors to save, by name; a tied head is left out."""
    return {k: v for k, v in model.state_dict().items() if not (k == TIED and model.config.tie_weights)}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all; the same tensors give the same bytes."""
    with atomic_write(path, "wb") as file:
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            save_file(plain, file.name, {"format": "pt"})  # not save(): its bytes would be in memory twice
        except SafetensorError as error:  # gives the error number of a full disk only in its text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for the CPU.  Raises UserError when it is damaged or has another format."""
    open(path, "rb").close()  # raises the system's own error for an unreadable file; safetensors says "no such file"
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): {ANEW}") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.  Raises UserError when it is damaged or has another format."""
    with open_tensors(path) as file:
        return file.get_tensors()


def save_model(
    folder: Path, config: GPTConfig, tensors: dict[str, Tensor], tokenizer_sha256: str | None = None
) -> None:
    """Write a model folder.  If it records the SHA-256 of its tokenizer.json, `load_pair` refuses any other."""
    save_tensors(folder / WEIGHTS_FILE, tensors)
    known = {} if tokenizer_sha256 is None else {TOKENIZER_KEY: tokenizer_sha256}
    write_json(folder / CONFIG_FILE, config_fields(config) | known)


def load_model(folder: str | Path) -> GPT:
    """Read a model folder into a GPT on the CPU in eval mode.  Raises UserError that says what is wrong with a file."""
    folder = Path(folder)
    config = read_record(GPTConfig, folder / CONFIG_FILE, stage="train", besides=(TOKENIZER_KEY,))
    weights = must_exist(folder / WEIGHTS_FILE, stage="train")
    found = read_shapes(weights)
    try:
        expected = expected_tensors(config, found)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None
    return filled_model(config, read_fitting(weights, expected, "its config.json"))


def load_pair(folder: str | Path, tokenizer: str | Path) -> tuple[GPT, Tokenizer]:
    """Read a model folder and the tokenizer that the model was trained with.

    Raises UserError when either cannot be read, or the model was trained with another tokenizer. A model folder that
    does not name its tokenizer accepts any with the right number of tokens.
    """
    model, found = load_model(folder), load_tokenizer(tokenizer)
    sha256 = read_json(Path(folder) / CONFIG_FILE, stage="train").get(TOKENIZER_KEY)
    if sha256 not in (None, sha256_file(tokenizer_file(tokenizer))) or found.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder} was not trained with the tokenizer in {tokenizer}: run `dvc repro`, or give a model and a "
            "tokenizer from the same run"
        )
    return model, found


def load_base(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> GPT:
    """A model with a base's weights.  Raises UserError when there is no base, or its model or tokenizer differs."""
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"train.init_from=base, but {folder} holds no model: run `python -m tinygpt import-hf FOLDER` or "
            "`python -m tinygpt promote`, or set train.init_from=scratch"
        )
    base, theirs = load_model(folder), load_tokenizer(folder)
    ours = config_fields(config)
    differing = [
        f"model.{key}={shown(ours[key])}, but {shown(value)} in the base"
        for key, value in config_fields(base.config).items()
        if key not in (*FREE, "vocab_size") and ours[key] != value
    ]
    if (theirs.tokens, theirs.merges) != (tokenizer.tokens, tokenizer.merges):
        differing.append("data/tokenizer is not the tokenizer of the base")
    if differing:
        raise UserError(
            f"{folder} does not fit params.yaml ({'; '.join(differing)}): run `python -m tinygpt preset base`, or "
            "`preset lora` for adapters, or set train.init_from=scratch and train.lora=null"
        )
    return filled_model(config, model_tensors(base)).train()


def read_shapes(path: Path) -> Shapes:
    """The shapes of a safetensors file's tensors, from its header alone.  Raises UserError when it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: weights must be in a safetensors file")
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}


def expected_tensors(config: GPTConfig, found: Shapes) -> dict[str, Tensor]:
    """The tensors of such a model, without values.  Raises UserError when they are far more numbers than were found."""
    n, n_found = config.n_weights(config.vocab_size), sum(map(math.prod, found.values()))
    if n > 2 * n_found:
        raise UserError(
            f"its config.json describes {n:,} weights, but {n_found:,} were found: use files from the same model"
        )
    with torch.device("meta"):
        return model_tensors(GPT(config, init=False))


def not_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are quantized, or not finite: both would load and compute nonsense."""
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS or not tensor.isfinite().all()]
    return [f"{len(odd)} tensors are quantized, not floating-point or not finite, such as {min(odd)}"] if odd else []


def misshapen(found: Shapes, expected: Shapes) -> list[str]:
    """Which tensors in both differ in shape."""
    both = sorted(expected.keys() & found.keys())
    return [f"{name} is {found[name]}, expected {expected[name]}" for name in both if found[name] != expected[name]]


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def filled_model(config: GPTConfig, tensors: dict[str, Tensor]) -> GPT:
    """A model with these weights, in eval mode; they need not include a tied head."""
    model = GPT(config, init=False)
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert not extra and set(missing) <= ({TIED} if config.tie_weights else set()), (missing, extra)
    return model.eval()


def read_fitting(path: Path, expected: Mapping[str, Tensor], fits: str) -> dict[str, Tensor]:
    """Read a safetensors file.  Raises UserError unless it has tensors like these; `fits` says what needs them."""
    found = read_shapes(path)
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    problems = sorted(problems + misshapen(found, shapes_of(expected)))
    if not problems:
        tensors = load_tensors(path)
        problems = not_weights(tensors)
    if problems:
        raise UserError(f"{path} does not fit {fits}: {some_of(problems, MOST_SHOWN)}: use files from the same run")
    return tensors
