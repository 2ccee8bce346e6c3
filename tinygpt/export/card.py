"""What people read about an export: the model card, the Modelfile for Ollama, and a line of the report.

https://huggingface.co/docs/hub/model-cards and https://docs.ollama.com/modelfile
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, UndefinedError

from tinygpt.errors import UserError
from tinygpt.files import human_bytes, read_json
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.params import read_record
from tinygpt.tokenizer import Tokenizer
from tinygpt.train.config import LoRAParams

Origin = dict[str, dict[str, Any]]  # how a model was made, from the stages' files, by name

TRAINING_FILE = "training.json"

CARDS = Path(__file__).with_name("cards")

MODELFILE = """\
FROM ./tinygpt-{weight_type}.gguf
TEMPLATE "{{{{ .Prompt }}}}"
PARAMETER num_ctx {n_ctx}
PARAMETER temperature 0.7
PARAMETER top_p 0.95
PARAMETER stop "{eos}"
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is used of data/model/training.json, which has all params of the training."""

    init_from: str
    lora: LoRAParams | None
    base_sha256: str | None  # of the weights that training started from


def read_origin(raw: Path, model: Path, reports: Path) -> Origin:
    """How a model was made, from the stages' files.  Raises UserError naming a bad file and the stage to run."""
    read_training(model)
    return {
        "manifest": read_json(raw / "manifest.json", stage="download"),
        "training": read_json(model / TRAINING_FILE, stage="train"),
        "evaluation": read_json(reports / "eval.json", stage="evaluate"),
    }


def read_training(model: Path) -> Training:
    """How the model in a folder was trained.  Raises UserError if its training.json is missing or damaged."""
    return read_record(Training, model / TRAINING_FILE, stage="train")


def model_card(config: GPTConfig, n_params: int, origin: Origin, n_ctx: int, weight_type: str | None = None) -> str:
    """The README.md of an export: what it was made from and how good it is, with numbers from the run.

    `n_ctx` is the context of the file; `weight_type` names the GGUF file to run, None = a folder for transformers.
    Raises UserError if `origin` lacks something that the card needs.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"n": lambda value: f"{value:,}", "shell": shlex.quote, "python": repr}
    template = environment.from_string((CARDS / "model.md").read_text(encoding="utf-8"))
    shown = {"config": config_fields(config), "n_params": n_params, "n_ctx": n_ctx, "weight_type": weight_type}
    try:
        return template.render(shown | origin)
    except (UndefinedError, TypeError, ValueError, AttributeError) as error:
        made = "data/raw/manifest.json, data/model/training.json or reports/eval.json"
        raise UserError(f"{made} is damaged or from another version of tinygpt ({error}): run `dvc repro`") from None


def modelfile(tokenizer: Tokenizer, weight_type: str, n_ctx: int) -> str:
    """The Modelfile that runs the GGUF file of this type in Ollama, on plain text without a chat template."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    return MODELFILE.format(weight_type=weight_type, n_ctx=n_ctx, eos=names[tokenizer.eos_id])


def remarks(entry: Mapping[str, Any], block_size: int) -> str:
    """An entry of reports/export.json in one line: size, family, types, perplexity, and a shorter context, if any."""
    said = [human_bytes(entry["bytes"]), entry["family"]]
    if "tensors" in entry:
        types = ", ".join(f"{n} {kind}" for kind, n in entry["tensors"].items())
        said.append(f"{entry['bits_per_weight']:.2f} bits a weight ({types})")
        said.append(f"perplexity {entry['ppl']:.4g} in llama.cpp and {entry['ppl_pytorch']:.4g} in PyTorch")
    if entry["context"] < block_size:
        said.append(
            f"A CONTEXT OF {entry['context']} TOKENS, NOT {block_size}: {entry['family']} has no such window, "
            "and with more tokens it computes something else"
        )
    return ", ".join(said)
