"""Whether a run sees enough text for its weights."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.model.config import ModelParams
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import TOKENS
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.tokens import load_meta
from tinygpt.train.config import TrainParams

# Tokens that a run sees for each weight, at least. On four texts (benchmarks/scaling.csv) models that saw 0.2, 0.4 and
# 0.8 were 0.20 to 0.25, 0.08 to 0.14 and 0.04 to 0.07 bits per byte worse than one of half or a quarter of the size
# that saw 3 to 7 with as many operations. The default sees 1.5; far larger models are best at 20
# (https://arxiv.org/abs/2203.15556).
MIN_TOKENS = 0.5
MAX_EPOCHS = 4  # times that a text is worth nearly as much as a new one (https://arxiv.org/abs/2305.16264)


def too_few_tokens(path: Path = PARAMS_FILE) -> str:
    """A line where the run of params.yaml, or the text that is there, is far too short for the weights; else nothing.

    A run that goes on from a base needs no more than it takes to change it.
    """
    model, train, tokenizer = load_params(ModelParams, TrainParams, TokenizerParams, path=path)
    if train.init_from == "base":
        return ""
    n_weights = model.n_weights(tokenizer.vocab_size)
    needed, per_step = MIN_TOKENS * n_weights, train.batch_size * model.block_size
    more = f"set train.max_steps={math.ceil(needed / per_step)} or more"
    found = [(train.max_steps * per_step, f"train.max_steps={train.max_steps}", more)]
    with suppress(UserError):  # no text yet, or none that can be read
        text = MAX_EPOCHS * load_meta(path.parent / TOKENS).train.tokens
        found.insert(0, (text, f"the text there is, read {MAX_EPOCHS} times", "take a larger text"))
    for n_tokens, where, remedy in found:
        if n_tokens < needed:
            return (
                f"warning: {n_weights:,} weights see {n_tokens:,} tokens in {where}. Below {MIN_TOKENS} a weight a "
                f"smaller model learns more in the same time: {remedy}, or take a smaller preset\n"
            )
    return ""
