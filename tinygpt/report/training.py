"""Write a finished run to the files that later stages and people read."""

import csv
import dataclasses
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinygpt.files import atomic_folder, fenced, human_bytes, write_json, write_text
from tinygpt.model.weights import ADAPTER_FILE, WEIGHTS_FILE, save_model, save_tensors
from tinygpt.train.trainer import Trained, Trainer, TrainState

METRICS = ("val_loss", "n_params", "seconds", "tokens_per_s", "peak_mem_gib")  # that DVC shows


def publish(
    trained: Trained, trainer: Trainer, model_dir: Path, reports_dir: Path, *, made_from: dict[str, str | None]
) -> dict[str, Any]:
    """Write the best and last weights, the curve, the samples and the summary; return the summary.

    `made_from` has the SHA-256 of the "tokenizer", and of the "base" whose weights the run started from, or None.
    """
    with atomic_folder(model_dir) as folder:
        save_model(folder, trainer.learner.config, trained.best, made_from["tokenizer"])
        save_tensors(folder / "last.safetensors", trained.last)
        if trainer.params.lora is not None:
            save_tensors(folder / ADAPTER_FILE, trained.trained)
        write_json(folder / "training.json", dataclasses.asdict(trainer.params) | {"base_sha256": made_from["base"]})
    write_curve(trained.state, reports_dir)
    report = _summary(trained, trainer)
    write_json(reports_dir / "train.json", report)
    write_json(reports_dir / "metrics/train.json", {name: report[name] for name in METRICS})
    return report


def write_curve(state: TrainState, *folders: Path) -> None:
    """Write the samples and the curve so far into each folder, each file whole or not at all."""
    samples = (f"\n## Step {sample['step']}\n\n{fenced(sample['text'])}" for sample in state.samples)
    texts = {"train_samples.md": "".join(["# Samples written while training\n", *samples])}
    if state.norms:  # before the first step there are none
        texts["train_norms.csv"] = as_csv(state.norms)
    texts["train.csv"] = as_csv(state.rows)  # last: `watch` reads the others when this has a new row
    for folder in folders:
        for name, text in texts.items():
            write_text(folder / name, text)


def as_csv(rows: Sequence[Mapping[str, float | None]]) -> str:
    """A line for each row; None gives an empty field.  (pandas takes longer to import than a run to publish.)"""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([f"{x:.8g}" if isinstance(x, float) else x for x in row.values()] for row in rows)
    return text.getvalue()


def described(report: dict[str, Any], model_dir: Path) -> str:
    """The summary in two lines."""
    size = human_bytes((model_dir / WEIGHTS_FILE).stat().st_size)
    adapters = f" and {report['n_trained']:,} of adapters" if (model_dir / ADAPTER_FILE).exists() else ""
    unchanged = (
        "" if report["best_step"] else ": no step improved it, so the weights that training started from are published"
    )
    return (
        f"train: {report['n_params']:,} weights ({size}){adapters}, {report['tokens']:,} tokens in "
        f"{report['seconds']:.0f} s\n"
        f"train: lowest validation loss {report['val_loss']:.4f}, at step {report['best_step']:,}{unchanged}"
    )


def _summary(trained: Trained, trainer: Trainer) -> dict[str, Any]:
    state = trained.state
    tokens = state.step * trainer.params.batch_size * trainer.batches.seq_len
    return {
        "val_loss": state.best_val_loss,
        "best_step": state.best_step,  # 0: the weights that it started from, as no step improved on them
        "first_val_loss": state.rows[0]["val_loss"],  # of the weights that it started from
        "last_val_loss": state.rows[-1]["val_loss"],
        "last_train_loss": state.rows[-1]["train_loss"],
        "n_params": sum(tensor.numel() for tensor in trained.best.values()),
        "n_trained": sum(tensor.numel() for tensor in trained.trained.values()),
        "tokens": tokens,
        "epochs": tokens / trainer.batches.ring,
        "seconds": state.seconds,
        "tokens_per_s": tokens / state.seconds,
        "peak_mem_gib": state.peak_mem_gib,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(trainer.learner.device),
            "processes": trainer.world.size,
            "threads": torch.get_num_threads(),
            "precision": str(trainer.learner.precision),
        },
    }
