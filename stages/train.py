"""Train the model; killed in any way and run again, it goes on and ends with the same bytes.

Reads data/tokens and data/tokenizer, and data/base where training starts from it. Writes data/model,
reports/train.csv, train_norms.csv, train.json and train_samples.md.
"""

import sys
from pathlib import Path

from tinygpt.errors import program
from tinygpt.export.config import ExportParams
from tinygpt.export.coverage import check_export
from tinygpt.files import human_bytes, sha256_file
from tinygpt.generate import Sampling, generate
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.device import open_device
from tinygpt.model.weights import WEIGHTS_FILE
from tinygpt.params import check_params, load_params
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokens import load_meta, load_tokens
from tinygpt.train.base import load_base
from tinygpt.train.checkpoint import Checkpoints, fingerprint
from tinygpt.train.config import TrainParams
from tinygpt.train.publish import publish
from tinygpt.train.sinks import Sinks
from tinygpt.train.trainer import Stopped, Trainer

TOKENIZER_DIR = Path("data/tokenizer")
TOKENS_DIR = Path("data/tokens")
MODEL_DIR = Path("data/model")
BASE_DIR = Path("data/base")
REPORTS_DIR = Path("reports")


@program
def main() -> None:
    """Run the stage."""
    check_params()  # of every stage that follows, before the long one
    model_params, params, runtime, export = load_params(ModelParams, TrainParams, RuntimeParams, ExportParams)
    tokenizer, meta = load_tokenizer(TOKENIZER_DIR), load_meta(TOKENS_DIR, tokenizer=TOKENIZER_DIR)
    config = GPTConfig(**config_fields(model_params), vocab_size=meta.vocab_size)
    check_export(config, export)
    tokens = {split: load_tokens(TOKENS_DIR, split, at_least=config.block_size + 1) for split in ("train", "val")}

    sampling = Sampling(seed=params.seed)
    base = load_base(BASE_DIR, config, tokenizer) if params.init_from == "base" else None
    base_sha256 = sha256_file(BASE_DIR / WEIGHTS_FILE) if base else None
    name = fingerprint(config, params, meta, base_sha256)
    with Checkpoints(name) as checkpoints, Sinks(runtime.log_to, checkpoints.folder, config, params) as sinks:
        checkpoints.note(max_steps=params.max_steps, finished=False)
        trainer = Trainer(
            config,
            params,
            runtime,
            train_tokens=tokens["train"],
            val_tokens=tokens["val"],
            checkpoints=checkpoints,
            device=open_device(runtime),
            write_sample=lambda model: generate(
                model, tokenizer, "", max_new_tokens=params.sample_tokens, sampling=sampling
            ),
            base=base,
            watch=sinks,
        )
        try:
            trained = trainer.fit()
        except Stopped as stopped:
            print(f"train: {stopped}", file=sys.stderr)
            sys.exit(128 + stopped.signal)
        report = publish(trained, trainer, MODEL_DIR, REPORTS_DIR, tokenizer=meta.tokenizer_sha256, base=base_sha256)
        checkpoints.note(max_steps=params.max_steps, finished=True)
    size = human_bytes((MODEL_DIR / "model.safetensors").stat().st_size)
    print(f"train: {report['n_params']:,} weights ({size}), {report['tokens']:,} tokens in {report['seconds']:.0f} s")
    print(f"train: lowest validation loss {report['val_loss']:.4f}, at step {report['best_step']:,}")


if __name__ == "__main__":
    main()
