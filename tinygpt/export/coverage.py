"""What of the model group can be exported where: refused before training, or shown as a table."""

from __future__ import annotations

from itertools import product

from tinygpt.export.config import ExportParams
from tinygpt.export.family import ANY_BIAS, Target, find_family, refusal
from tinygpt.export.gguf_families import LLAMA_CPP
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.model.config import ModelParams
from tinygpt.params import require

MIN_BLOCK_SIZE = 4  # half a context and one token more are read before the first that counts for perplexity
CORE = {
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu", "relu2"),
    "parallel_block": (False, True),
    "qk_norm": (False, True),
}


def check_export(config: ModelParams, export: ExportParams) -> None:
    """Refuse a model that cannot be exported as asked, before it is trained.  Raises ParamsError."""
    targets = [*([TRANSFORMERS] if export.hf else []), *([LLAMA_CPP] if export.gguf else [])]
    covered = [find_family(target.families, config) for target in targets]
    n_ctx = covered[-1][1] if covered and covered[-1] else config.block_size
    key = "block_size" if n_ctx == config.block_size else "window"
    require(
        (None not in covered, refusal(targets, config) if None in covered else ""),
        (
            not export.gguf or n_ctx >= MIN_BLOCK_SIZE,
            f"model.{key}={n_ctx} is too short to check export.gguf: at least {MIN_BLOCK_SIZE}",
        ),
    )


def coverage_table() -> str:
    """The combinations that can be exported, as a Markdown table."""
    columns = ["position", "norm", "mlp", "parallel_block", "qk_norm"]
    rows = [[*(f"`{key}`" for key in columns), "llama.cpp (bias)", "transformers (bias)"], ["---"] * 7]
    for values in product(*CORE.values()):
        cells = [_cell(target, dict(zip(CORE, values, strict=True))) for target in (LLAMA_CPP, TRANSFORMERS)]
        if any(cells):
            rows.append([*(str(value).lower() for value in values), *(cell or "–" for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(target: Target, core: dict[str, object]) -> str:
    """The families of a combination, with the biases that they allow."""
    found = {
        family.name: [bias for bias in ANY_BIAS if bias in family.switches["bias"]]
        for family in target.families
        if all(value in family.switches[key] for key, value in core.items()) and "null" in family.switches["window"]
    }
    return ", ".join(f"`{name}` ({', '.join(biases)})" for name, biases in found.items())
