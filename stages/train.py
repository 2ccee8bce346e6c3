"""Train the model; killed in any way and run again, it goes on and ends with the same bytes.

Reads data/tokens and data/tokenizer, and data/base where training starts from it. Writes data/model,
reports/train.csv, train_norms.csv, train.json and train_samples.md.
"""

from pathlib import Path

from tinygpt.errors import program
from tinygpt.export.config import ExportParams
from tinygpt.export.coverage import check_export
from tinygpt.files import sha256_file
from tinygpt.generate import Sampling, generate
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import WEIGHTS_FILE
from tinygpt.params import check_params, load_params
from tinygpt.report.training import described, publish
from tinygpt.run.checkpoint import fingerprint
from tinygpt.run.processes import open_devices, start
from tinygpt.run.run import Run
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokens import load_meta, load_tokens
from tinygpt.train.base import load_base
from tinygpt.train.config import TrainParams
from tinygpt.train.parallel import World
from tinygpt.train.trainer import Trainer

TOKENIZER_DIR = Path("data/tokenizer")
TOKENS_DIR = Path("data/tokens")
MODEL_DIR = Path("data/model")
BASE_DIR = Path("data/base")
REPORTS_DIR = Path("reports")


@program
def main() -> None:
    """Run the stage."""
    check_params()  # of every stage that follows, before the long one
    start(train, load_params(RuntimeParams))


def train(world: World) -> None:
    """Train in one of the processes."""
    model_params, params, runtime, export = load_params(ModelParams, TrainParams, RuntimeParams, ExportParams)
    tokenizer, meta = load_tokenizer(TOKENIZER_DIR), load_meta(TOKENS_DIR, tokenizer=TOKENIZER_DIR)
    config = GPTConfig(**config_fields(model_params), vocab_size=meta.vocab_size)
    check_export(config, export)
    tokens = {split: load_tokens(TOKENS_DIR, split, at_least=config.block_size + 1) for split in ("train", "val")}
    sampling = Sampling(seed=params.seed)
    base = load_base(BASE_DIR, config, tokenizer) if params.init_from == "base" else None
    base_sha256 = sha256_file(BASE_DIR / WEIGHTS_FILE) if base else None
    name = fingerprint(config, params, meta, base_sha256)

    def write_sample(model: GPT) -> str:
        return generate(model, tokenizer, "", max_new_tokens=params.sample_tokens, sampling=sampling)

    with Run(name, config, params, runtime, world=world, write_sample=write_sample) as run:
        trainer = Trainer(
            config,
            params,
            runtime,
            train_tokens=tokens["train"],
            val_tokens=tokens["val"],
            device=open_devices(runtime, world, params),
            world=world,
            base=base,
        )
        run.note(finished=False)  # now that nothing is refused any more
        trained = trainer.fit(run)
        shas = {"tokenizer": meta.tokenizer_sha256, "base": base_sha256}
        shas = {"tokenizer": meta.tokenizer_sha256, "base": base_sha256}
        report = world.first(lambda: publish(trained, trainer, MODEL_DIR, REPORTS_DIR, made_from=shas))
        run.note(finished=True)
    if world.rank == 0:
        print(described(report, MODEL_DIR))


if __name__ == "__main__":
    main()
