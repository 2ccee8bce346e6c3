"""Export the model for transformers and llama.cpp, and check every GGUF file against the model.

Reads data/model, data/tokenizer and data/tokens, and for the model card data/raw/manifest.json and
reports/eval.json. Writes data/export and reports/export.json.
"""

from functools import partial
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.export.card import model_card, modelfile, read_origin, remarks
from tinygpt.export.config import ExportParams
from tinygpt.export.folders import export_adapters
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.verify import CHUNK_SIZE, check_gguf
from tinygpt.files import atomic_folder, write_json
from tinygpt.model.weights import load_pair
from tinygpt.params import PARAMS_FILE, load_params, require
from tinygpt.paths import BASE, EXPORT, MODEL, RAW, REPORTS, TOKENIZER, TOKENS
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.stage import run_stage
from tinygpt.tokens import load_meta, load_tokens

CARD_FILE = "README.md"
REPORT = REPORTS / "export.json"


def run(root: Path) -> None:
    """Run the stage in the project's folder.

    data/export appears only if every file passes its check, the report only if llama.cpp can load every file.
    """
    params, runtime = load_params(ExportParams, RuntimeParams, path=root / PARAMS_FILE)
    open_device(runtime)  # to set the threads: the comparison with llama.cpp runs on the CPU
    model, tokenizer = load_pair(root / MODEL, root / TOKENIZER)
    require(*params.rules_with({"model": model.config}))
    meta, least = load_meta(root / TOKENS, tokenizer=root / TOKENIZER), min(CHUNK_SIZE, model.config.block_size)
    split = "test" if meta.test.tokens >= least else "val"  # training needed at least this many val tokens
    ids = load_tokens(root / TOKENS, split, at_least=least)[: params.check_tokens]
    origin = read_origin(root / RAW, root / MODEL, root / REPORTS)
    card = partial(model_card, model.config, model.n_params(), origin)
    report, failures = dict[str, dict[str, Any]](), list[str]()
    with atomic_folder(root / EXPORT) as folder:
        if params.hf:
            family, n_ctx = export_hf(model, tokenizer, root / TOKENIZER, folder / "hf")
            size = sum(file.stat().st_size for file in (folder / "hf").iterdir())
            (folder / "hf" / CARD_FILE).write_text(card(n_ctx), encoding="utf-8")
            report["hf"] = {"family": family, "context": n_ctx, "bytes": size}
        for weight_type in params.gguf:
            path = folder / "gguf" / f"tinygpt-{weight_type}.gguf"
            made = export_gguf(model, tokenizer, path, weight_type)
            measures, problems = check_gguf(model, tokenizer, path, weight_type, ids)
            report[weight_type] = made.entry(path.stat().st_size, measures)
            write_json(path.with_suffix(".types.json"), made.types)
            failures += problems
            (path.parent / CARD_FILE).write_text(card(made.n_ctx, weight_type), encoding="utf-8")
            (path.parent / "Modelfile").write_text(modelfile(tokenizer, weight_type, made.n_ctx), encoding="utf-8")
        adapters = export_adapters(folder, root / MODEL, root / BASE, model, params)
        write_json(root / REPORT, report)
        if failures:
            raise UserError([*failures, f"so {EXPORT} is not written, see {REPORT}"])
    lines = [f"{name} {remarks(entry, model.config.block_size)}" for name, entry in report.items()]
    for line in [*lines, *adapters]:
        print(f"export: {line}")


if __name__ == "__main__":
    run_stage(run)
