"""What 200 steps from a base gain on another text, with presets/base.yaml and presets/lora.yaml unchanged.

    python -m benchmarks.fine_tuning --out FOLDER --text shakespeare=FILE --text kjv=FILE --text code=FOLDER

For each pair in PAIRS whose texts are given, a model of the first text, trained for 400 steps from scratch, learns the
second; `--base python-docs=FOLDER` takes the model of a finished project instead. This is compared with as many steps
from scratch, with the base's context, params.yaml's rates and a tokenizer of the text's own. Tokenizers differ, so
losses are in bits per byte, over all of the validation text. Prints a table. Finished runs are not repeated, and
stopped ones continue.
"""

import argparse
from argparse import Namespace
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.scaling import ROOT, Trial, bits, measure
from quickstart import new_project, run_stages
from tinygpt import paths
from tinygpt.cli.project import PRESETS, apply_values, preset, promote
from tinygpt.errors import program
from tinygpt.files import read_json, sha256_file
from tinygpt.model.config import ModelParams
from tinygpt.model.weights import WEIGHTS_FILE
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.plan.recipe import LAYERS
from tinygpt.tokens import load_meta

# The base's text, and the text it learns. In the last pair they are the same, and nothing must become worse.
PAIRS = (
    ("python-docs", "shakespeare"),
    ("shakespeare", "kjv"),
    ("python-docs", "code"),
    ("python-docs", "python-docs"),
)
BASE_STEPS, STEPS = 400, 200
STEP_TOKENS = Trial.batch_size * Trial.block_size  # as from scratch
MAX_BYTES = 2_000_000  # of the other text
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # the preset, and changes to it, tried on the same text only
    "all weights": ("base", {}),
    "LoRA": ("lora", {}),
    "far too high rates": ("base", {"lr": 0.1, "embedding_lr": 0.4}),
}


def start(project: Path, source: str, base: Path, max_bytes: int | None) -> None:
    """Set up a project with a base, and a text encoded with the base's tokenizer."""
    new_project(project, {"download.source": source, "download.max_bytes": max_bytes, "runtime.n_worker": 1})
    if not (project / PRESETS).exists():
        (project / PRESETS).symlink_to(ROOT / PRESETS)
    with chdir(project):
        promote(Namespace(model=base / paths.MODEL, tokenizer=base / paths.TOKENIZER, to=paths.BASE))
        preset(Namespace(name="base"))
    run_stages(project, "download", "clean", "train_tokenizer", "encode")


def go_on(project: Path, name: str, changes: dict[str, Any]) -> list[str]:
    """Train with a preset -> cells: bits per byte before, after the last step, and of the published model; its step"""
    new_project(project, {"train.eval_tokens": 100_000, "train.sample_tokens": 0, "runtime.n_thread": 1})
    with chdir(project):
        preset(Namespace(name=name))
    block_size = load_params(ModelParams, path=project / PARAMS_FILE).block_size
    apply_values(project / PARAMS_FILE, {"train": {"batch_size": STEP_TOKENS // block_size} | changes})
    run_stages(project, "train")
    report, val = read_json(project / "reports/train.json", stage="train"), load_meta(project / paths.TOKENS).val
    losses = (f"{report[loss] * bits(val):.3f}" for loss in ("first_val_loss", "last_val_loss", "val_loss"))
    return [*losses, f"{report['best_step']}"]


@program
def main() -> None:
    """Run what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=SOURCE", help="a text, again for each")
    parser.add_argument("--base", action="append", default=[], metavar="NAME=FOLDER", help="a finished project")
    parser.add_argument("--width", type=int, default=128, choices=LAYERS, help="of the models that are trained here")
    arguments = parser.parse_args()
    sources = {"python-docs": "python-docs"} | dict(text.split("=", 1) for text in arguments.text)
    given = {name: Path(folder).resolve() for name, folder in (base.split("=", 1) for base in arguments.base)}
    out = arguments.out.resolve()
    rows = ["| base | text | | before | from scratch | last step | published | of step |", "|" + "---|" * 8]
    for first, text in PAIRS:
        if not {first, text} <= sources.keys():
            continue
        trial = Trial(first, BASE_STEPS, n_embd=arguments.width)
        if first not in given:
            measure(trial, sources[first], out)
        same, base = first == text, given.get(first, out / trial.name)
        of_base = sha256_file(base / paths.MODEL / WEIGHTS_FILE)[:8]
        project = out / f"{first}-to-{text}-{arguments.width}-{of_base}"
        if not (project / paths.TOKENS).exists():
            start(project, sources[text], base, None if same else MAX_BYTES)
        block_size = load_params(ModelParams, path=base / PARAMS_FILE).block_size
        context = {"block_size": block_size, "batch_size": STEP_TOKENS // block_size}
        scratch = replace(trial, text=text, max_steps=STEPS, max_bytes=MAX_BYTES, **context)
        from_scratch = "" if same else f"{measure(scratch, sources[text], out)['val_bpb']:.3f}"
        for name, (kind, changes) in VARIANTS.items():
            if same or not changes:
                before, *after = go_on(project, kind, changes)
                rows.append(f"| {' | '.join((first, text, name, before, from_scratch, *after))} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
