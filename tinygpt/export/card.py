"""What people read of an export: the model card, the Modelfile by which Ollama runs it, and the report.

https://huggingface.co/docs/hub/model-cards and https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinygpt.files import human_bytes, read_json
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.params import read_record
from tinygpt.tokenizer import Tokenizer
from tinygpt.train.config import LoRAParams

TRAINING_FILE = "training.json"

CARD = """\
---
{library}pipeline_tag: text-generation
tags: [tinygpt]
---
# A small language model

{n_params:,} weights, {n_layer} layers, {n_embd} wide, a context of {n_ctx:,} tokens{shorter}; trained {start} on
{source} (licence of the text: {licence}) with tinygpt. It continues text like that and knows nothing else.

| measured on held-out text ({split}, {tokens:,} tokens, {context} of context) | |
|---|---|
| loss | {loss:.4f} nats per token |
| perplexity | {ppl:.2f} |
| bits per byte | {bpb:.4f} |

## How to run it

{run}
## How it was made

| model | |
|---|---|
{model}

| training | |
|---|---|
{training}
"""

TRANSFORMERS = """\
```python
from transformers import pipeline

print(pipeline("text-generation", "path/to/this/folder")("Once upon a time")[0]["generated_text"])
```
"""

LLAMA_CPP = """\
With llama.cpp or Ollama, from this folder:

```console
$ llama-completion -m tinygpt-{weight_type}.gguf -no-cnv -p "Once upon a time" -n 100
$ ollama create tinygpt -f Modelfile && ollama run tinygpt "Once upon a time"
```
"""

ADAPTER_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [tinygpt]
---
# Adapters of a small language model

They belong to the model in `data/base`, which the PEFT library needs as a folder of transformers. From the project's
top folder, this writes it:

```python
from tinygpt.export.hf import export_hf
from tinygpt.model.weights import load_pair

export_hf(*load_pair("data/base", "data/base"), "data/base", "data/base-hf")
```

and this loads both:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("data/export/peft")
```

Elsewhere, take both folders along:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("data/base-hf"), "data/export/peft")
```
"""

MODELFILE = """\
FROM ./tinygpt-{weight_type}.gguf
TEMPLATE "{{{{ .Prompt }}}}"
PARAMETER num_ctx {n_ctx}
PARAMETER temperature 0.7
PARAMETER top_p 0.95
PARAMETER stop "{eos}"
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Of the text: what is told of data/raw/manifest.json."""

    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """What has to be known of data/model/training.json, which has all params of the training."""

    init_from: str
    lora: LoRAParams | None
    base_sha256: str | None  # of the weights that it started from


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is told of reports/eval.json."""

    split: str
    tokens: int
    context: int
    loss: float
    ppl: float
    bpb: float


@dataclass(frozen=True)
class Origin:
    """What a model was made from, as the stages wrote it."""

    manifest: Mapping[str, Any]  # of data/raw
    training: Mapping[str, Any]  # params
    evaluation: Mapping[str, Any]  # reports/eval.json


def read_origin(raw: Path, model: Path, reports: Path) -> Origin:
    """Read it from the stages' folders.  Raises UserError that names the file, its key, and the stage to run."""
    read_training(model)
    return Origin(
        manifest=asdict(read_record(Source, raw / "manifest.json", stage="download")),
        training=read_json(model / TRAINING_FILE, stage="train"),
        evaluation=asdict(read_record(Evaluation, reports / "eval.json", stage="evaluate")),
    )


def read_training(model: Path) -> Training:
    """How the model of a folder was trained.  Raises UserError where its training.json does not say."""
    return read_record(Training, model / TRAINING_FILE, stage="train")


def model_card(config: GPTConfig, n_params: int, origin: Origin, n_ctx: int, weight_type: str | None = None) -> str:
    """The README.md of an export: what it was made from and how well it does, in numbers that the run decides.

    `n_ctx` is the context of the file; `weight_type` names the GGUF file to run, None a folder for transformers.
    """
    return CARD.format(
        n_params=n_params,
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_ctx=n_ctx,
        shorter="" if n_ctx == config.block_size else f" in this format ({config.block_size:,} in tinygpt)",
        start="from scratch" if origin.training["init_from"] == "scratch" else "from the weights of another model",
        source=origin.manifest["source"],
        licence=origin.manifest["licence"],
        library="" if weight_type else "library_name: transformers\n",
        run=LLAMA_CPP.format(weight_type=weight_type) if weight_type else TRANSFORMERS,
        model=_rows(config_fields(config)),
        training=_rows(origin.training),
        **{key: origin.evaluation[key] for key in ("split", "tokens", "context", "loss", "ppl", "bpb")},
    )


def modelfile(tokenizer: Tokenizer, weight_type: str, n_ctx: int) -> str:
    """How Ollama runs the GGUF file of this type: text as it is, without a chat template."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    return MODELFILE.format(weight_type=weight_type, n_ctx=n_ctx, eos=names[tokenizer.eos_id])


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in values.items() if value is not None)


def remarks(entry: Mapping[str, Any], block_size: int) -> str:
    """One line from its entry in reports/export.json: size, family, types, perplexity, and what it has lost."""
    said = [human_bytes(entry["bytes"]), entry["family"]]
    if "tensors" in entry:
        types = ", ".join(f"{n} {kind}" for kind, n in entry["tensors"].items())
        said.append(f"{entry['bits_per_weight']:.2f} bits a weight ({types})")
        said.append(f"perplexity {entry['ppl']:.2f} in llama.cpp and {entry['ppl_pytorch']:.2f} in PyTorch")
    if entry["context"] < block_size:
        said.append(
            f"A CONTEXT OF {entry['context']} TOKENS, NOT {block_size}: {entry['family']} knows no such window, "
            "and with more tokens computes something else"
        )
    return ", ".join(said)
