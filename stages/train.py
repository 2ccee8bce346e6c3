"""Train the model. If killed in any way and run again, training continues and ends with the same bytes.

Reads data/tokens and data/tokenizer, and data/base if training starts from it. Writes data/model,
reports/train.csv, train_norms.csv, train.json and train_samples.md.
"""

from functools import partial
from pathlib import Path

import torch

from tinygpt.files import runs_folder, sha256_file
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import WEIGHTS_FILE, load_base
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import BASE, MODEL, REPORTS, TOKENIZER, TOKENS
from tinygpt.report.training import described, publish, write_curve
from tinygpt.run.checkpoint import fingerprint
from tinygpt.run.folder import name_of
from tinygpt.run.processes import open_devices, start
from tinygpt.run.run import Run
from tinygpt.runtime import RuntimeParams
from tinygpt.stage import run_stage
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokens import load_meta, load_tokens
from tinygpt.train.config import TrainParams
from tinygpt.train.first_weights import set_first_weights
from tinygpt.train.learner import Learner
from tinygpt.train.parallel import World
from tinygpt.train.trainer import Trainer, TrainState


def run(root: Path) -> None:
    """Run the stage in the project's folder, in one process or several."""
    start(partial(train, root), load_params(RuntimeParams, path=root / PARAMS_FILE))


def train(root: Path, world: World) -> None:
    """Train in one of the processes."""
    with world.together():
        model_params, params, runtime = load_params(ModelParams, TrainParams, RuntimeParams, path=root / PARAMS_FILE)
        tokenizer, meta = load_tokenizer(root / TOKENIZER), load_meta(root / TOKENS, tokenizer=root / TOKENIZER)
        config = GPTConfig(**config_fields(model_params), vocab_size=meta.vocab_size)
        least = config.block_size + 1
        train_tokens, val_tokens = (load_tokens(root / TOKENS, name, at_least=least) for name in ("train", "val"))
        base_sha256 = None
        if params.init_from == "base":
            model = load_base(root / BASE, config, tokenizer)
            base_sha256 = sha256_file(root / BASE / WEIGHTS_FILE)
        else:
            model = GPT(config, generator=torch.Generator().manual_seed(params.seed))
    name = fingerprint(config, params, meta, base_sha256)
    runs = runs_folder(root)

    def show(state: TrainState) -> None:
        write_curve(state, root / REPORTS, runs / name)  # for DVC, and for `python -m tinygpt watch` of any run

    called = name_of(root)
    with Run(
        name, config, params, runtime, tokenizer=tokenizer, world=world, runs=runs, show=show, called=called
    ) as run:
        with world.together():
            device = open_devices(runtime, world, params)
        if params.init_from == "scratch":
            set_first_weights(model, train_tokens)
        learner = Learner(model, params, runtime, device=device, world=world)
        trainer = Trainer(learner, train_tokens=train_tokens, val_tokens=val_tokens)
        world.first(lambda: run.checkpoints.note(max_steps=params.max_steps, finished=False))  # all checks have passed
        trained, made_from = trainer.fit(run), {"tokenizer": meta.tokenizer_sha256, "base": base_sha256}
        report = world.first(lambda: publish(trained, trainer, root / MODEL, root / REPORTS, made_from=made_from))
        world.first(lambda: run.checkpoints.note(max_steps=params.max_steps, finished=True))
    if world.rank == 0:
        print(described(report, root / MODEL))


if __name__ == "__main__":
    run_stage(run)
