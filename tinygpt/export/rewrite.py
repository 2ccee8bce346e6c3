"""A model written as another one that computes the same, for a program that knows no model with its norm.

LayerNorm is RMSNorm of numbers whose mean is zero, and both ways lead through that:

centered   Whatever is added to the residual stream loses its mean, which LayerNorm would take away: then RMSNorm does.
doubled    The stream x becomes [x, -x], whose mean is zero and whose mean square is that of x: LayerNorm is RMSNorm
           there. It is twice as wide, so attention has four times the weights and the MLP twice.

Only float rounding differs. C n_embd, H n_head, D head_dim, F n_hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinygpt.errors import UserError
from tinygpt.export.family import Target, find_family
from tinygpt.export.layout import QKV, leaf
from tinygpt.export.names import NORMS
from tinygpt.model.config import ModelParams
from tinygpt.model.gpt import GPT, TIED
from tinygpt.model.weights import fill, model_tensors, unset_model

EMBEDDINGS = ("tok_emb", "pos_emb")  # (N, C): they add rows to the stream
WRITERS = ("o_proj", "down_proj")  # (C, …): they add columns to it
MAX_DIFFERENCE = 1e-3  # of a log-probability


class Rewrite(NamedTuple):
    """One way to write a model: the config it then has, None where it does not apply, and what a tensor becomes."""

    config: Callable[[ModelParams], ModelParams | None]
    tensor: Callable[[str, Tensor], Tensor]


def rewritten(config: ModelParams, target: Target) -> ModelParams:
    """The config of the model that rewrite_model makes."""
    found = _fitting(config, target)
    return found.config(config) or config if found else config


def rewrite_model(model: GPT, target: Target) -> GPT:
    """One that computes the same and that the program knows, or knows with a longer context than the model itself.

    The model itself where there is none, or none is needed.  Raises UserError when they do not compute the same.
    """
    found = _fitting(model.config, target)
    if found is None:
        return model
    tensors = model_tensors(model)
    tensors |= {TIED: tensors.get(TIED, tensors["tok_emb.weight"])}  # the head does not read what the embedding writes
    made = unset_model(replace(model.config, **vars(rewritten(model.config, target))))
    without = {name: torch.zeros_like(tensor) for name, tensor in made.state_dict().items()}  # biases of norms
    fill(made, without | {name: found.tensor(name, tensor) for name, tensor in tensors.items()})
    ids = torch.arange(model.config.block_size)[None] % model.config.vocab_size
    with torch.inference_mode():
        difference = float((model(ids).log_softmax(-1) - made(ids).log_softmax(-1)).abs().max())
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"the model with model.norm={made.config.norm} differs by {difference:.1e} in a log-probability, more than "
            "rounding explains: its weights are too large for it, so set export.rewrite=false"
        )
    return made


def _fitting(config: ModelParams, target: Target) -> Rewrite | None:
    """The first rewrite of those with which the program knows the longest context, longer than without."""
    best, longest = None, _known_context(config, target)
    for rewrite in REWRITES:
        made = rewrite.config(config)
        if made and _known_context(made, target) > longest:
            best, longest = rewrite, _known_context(made, target)
    return best


def _known_context(config: ModelParams, target: Target) -> int:
    found = find_family(target.families, config)
    return found[1] if found else 0


def _centered_config(config: ModelParams) -> ModelParams | None:
    if config.norm != "layernorm" or config.qk_norm or config.bias == "all":
        return None  # the last norm's bias, and a norm of queries and keys, cannot be moved into other tensors
    return replace(config, norm="rmsnorm", tie_weights=False)


def _center(name: str, tensor: Tensor) -> Tensor:
    if leaf(name) in EMBEDDINGS:
        return (tensor.double() - tensor.double().mean(1, keepdim=True)).float()
    if leaf(name) in WRITERS:
        return (tensor.double() - tensor.double().mean(0, keepdim=True)).float()
    return tensor


def _doubled_config(config: ModelParams) -> ModelParams | None:
    if config.norm != "rmsnorm" or config.qk_norm or config.head_dim * config.n_head != config.n_embd:
        return None
    return replace(
        config,
        norm="layernorm",
        n_embd=2 * config.n_embd,
        n_head=2 * config.n_head,
        n_kv_head=2 * config.n_kv_head,
        tie_weights=False,
    )


def _double(name: str, tensor: Tensor) -> Tensor:
    """(N, C) -> (N, 2C), (C, …) -> (2C, …), (…, C) -> (…, 2C); the second half of the heads gives zeros."""
    module, kind = leaf(name), name.rpartition(".")[2]
    if module in EMBEDDINGS:
        return torch.cat([tensor, -tensor], 1)
    if module in NORMS:
        return torch.cat([tensor, tensor])
    if module in WRITERS:
        tensor = torch.cat([tensor, -tensor])
        return pad(tensor, (0, tensor.size(1))) if module == "o_proj" and kind == "weight" else tensor
    tensor = pad(tensor, (0, tensor.size(1))) if kind == "weight" else tensor
    return torch.cat([tensor, torch.zeros_like(tensor)]) if module in QKV else tensor


REWRITES = (Rewrite(_centered_config, _center), Rewrite(_doubled_config, _double))
