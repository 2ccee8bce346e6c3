"""A model of 11 million weights and a draft model a tenth as large, trained on the same made-up, repetitive text.

    python -m benchmarks.pair FOLDER           # minutes on two cores -> FOLDER/model, /draft, /tokenizer
    python -m benchmarks.generation --pair FOLDER
    python -m tinygpt generate --model FOLDER/model --tokenizer FOLDER/tokenizer --draft FOLDER/draft --prompt "class "

The text consists of Python classes whose methods differ in a name, much as in generated code, tables and logs: after
the name, most tokens are certain; before it, none is.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plain_gpt import train_by_params
from tinygpt.model.config import GPTConfig
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.params import load_params
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.train.config import TrainParams

VOCAB_SIZE = 1024
TARGET: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "qk_norm": False, "tie_weights": True}
DRAFT = TARGET | {"n_layer": 1, "n_head": 4, "n_embd": 256}  # one layer: its time is mostly overhead of operations
METHOD = '''
    def set_{name}(self, {name}: {kind}) -> None:
        """Set the {name} of this {thing}."""
        if not isinstance({name}, {kind}):
            raise TypeError("{name} must be of type {kind}")
        self._{name} = {name}
'''


def repetitive_text(n_class: int, *, seed: int) -> Iterator[str]:
    """Classes with a few methods each; names and types are random, the rest follows."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [a + b for a in syllables[::5] for b in syllables[::4]]
    for _ in range(n_class):
        thing = rng.choice(words)
        methods = []
        for _ in range(rng.randint(3, 8)):
            kind, name = rng.choice(["int", "str", "float", "list"]), rng.choice(words)
            methods.append(METHOD.format(name=name, kind=kind, thing=thing))
        yield f'class {thing.title()}:\n    """A {thing}."""\n' + "".join(methods) + "\n"


def train(config: GPTConfig, ids: np.ndarray, steps: int) -> dict[str, Any]:
    """Train by params.yaml's recipe with adamw, whose step takes a quarter of muon's time at this size -> tensors."""
    params, runtime = load_params(TrainParams, RuntimeParams)
    once: dict[str, Any] = {"eval_every": 10**9, "save_every": 10**9, "eval_tokens": 2048, "sample_tokens": 0}
    recipe: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "embedding_lr": None, "batch_size": 2}
    params = replace(params, max_steps=steps, **recipe, **once)
    n_train = len(ids) * 99 // 100
    trainer = train_by_params(config, params, runtime, np.r_[ids[:n_train], ids[:1]], ids[n_train:])
    print(f"{trainer.learner.model.n_params():,} weights, validation loss {trainer.state.best_val_loss}", flush=True)
    return model_tensors(trainer.learner.model)


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    texts = list(repetitive_text(1500, seed=0))
    tokenizer: Tokenizer = train_bpe(texts, VOCAB_SIZE)
    tokenizer.save(args.folder / "tokenizer")
    ids = np.array([i for text in texts for i in (tokenizer.bos_id, *tokenizer.encode(text))], dtype=np.uint16)
    print(f"{len(texts)} texts, {len(ids):,} tokens, {tokenizer.vocab_size} kinds of them", flush=True)
    for name, fields in (("draft", DRAFT), ("model", TARGET)):
        config = GPTConfig(**fields, vocab_size=tokenizer.vocab_size)
        save_model(args.folder / name, config, train(config, ids, args.steps))


if __name__ == "__main__":
    main()
