"""A folder of transformers, of a family that we export, as a model of ours: the way back of hf.py.

What this GPT does not compute, such as scaled rotary positions, is refused: it would load and compute something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.family import ANY_BIAS, find_family, switches_of
from tinygpt.export.hf_families import ACTIVATIONS, HF_FAMILIES, HFFamily
from tinygpt.export.reverse import Misfit, revert_layout
from tinygpt.model.config import GPTConfig
from tinygpt.model.weights import load_tensors
from tinygpt.params import ParamsError, from_mapping

FAMILIES = {family.name: family for family in HF_FAMILIES}
MLPS = {activation: mlp for mlp, activation in ACTIVATIONS.items()} | {"gelu_new": "gelu", "gelu_fast": "gelu"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # no weights; older files have them

# Values that a model of each family must have, and has where config.json is silent.
ROPE_FIXED = {"rope_scaling": None, "partial_rotary_factor": 1.0, "rope_type": "default"}
FIXED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "cohere2": ROPE_FIXED | {"logit_scale": 1.0},
}
SILENT: Mapping[str, Mapping[str, Any]] = {"cohere2": {"logit_scale": 0.0625}}  # where that is another value
TIED_IF_SILENT = ("starcoder2", "cohere2")


def read_hf(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the tensors, float32 and by our names, of a folder.

    Raises UserError with all that is wrong with it.
    """
    document = _read_json(folder / "config.json")
    family = FAMILIES.get(str(document.get("model_type")))
    if family is None:
        raise UserError(
            f"{folder / 'config.json'} is of model_type {document.get('model_type')}, covered are {', '.join(FAMILIES)}"
        )
    config = _read_config(folder / "config.json", document, family)
    tensors = _read_tensors(folder, family)
    misfits: list[Misfit] = []
    try:
        for bias in (bias for bias in ANY_BIAS if bias in family.switches["bias"]):
            try:  # the first that holds what is not zero
                biased = replace(config, bias=bias)
                return biased, revert_layout(tensors, biased, family.layout)
            except Misfit as misfit:
                misfits.append(misfit)
        raise min(reversed(misfits), key=lambda misfit: len(misfit.problems))  # of equals that with most biases
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read_config(path: Path, document: Mapping[str, Any], family: HFFamily) -> GPTConfig:
    """The config, of whatever bias.  Raises UserError with all that is wrong with the document."""
    problems: list[str] = []
    try:
        problems += _fixed_problems(document, family)
        fields = _gpt2_fields(document) if family.name == "gpt2" else _rope_fields(document, family)
        config = from_mapping(GPTConfig, fields | {"norm_eps": document[family.eps], "bias": "none"}, prefix="model.")
        problems += _switch_problems(config, family)
    except KeyError as error:
        problems.append(f"it has no {error.args[0]}")
    except (TypeError, AttributeError) as error:
        problems.append(f"it has a value of another type ({error})")
    except ParamsError as error:
        problems += error.problems
    if problems:
        raise UserError(f"{path} is no model that can be taken: {'; '.join(problems)}")
    return config


def _switch_problems(config: GPTConfig, family: HFFamily) -> list[str]:
    """What the class computes in another way than a model of the same switches here."""
    if find_family([family], config):
        return []
    found = switches_of(config)
    shown = ", ".join(f"{key}: {found[key]}" for key, allowed in family.switches.items() if found[key] not in allowed)
    return [f"a {family.name} is not the same here with {shown}"]


def _fixed_problems(document: Mapping[str, Any], family: HFFamily) -> list[str]:
    found = {**SILENT.get(family.name, {}), **document, **(document.get("rope_parameters") or {})}
    fixed = FIXED.get(family.name, ROPE_FIXED)
    return [f"{key}={found[key]}, not {value}" for key, value in fixed.items() if key in found and found[key] != value]


def _gpt2_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    return _plain() | {
        "n_layer": document["n_layer"],
        "n_head": document["n_head"],
        "n_kv_head": document["n_head"],
        "n_embd": document["n_embd"],
        "head_dim": None,
        "n_hidden": document.get("n_inner") or 4 * document["n_embd"],
        "block_size": document["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "mlp": _mlp(document["activation_function"]),
        "tie_weights": document.get("tie_word_embeddings", True),
        "vocab_size": document["vocab_size"],
    }


def _rope_fields(document: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    rope = document.get("rope_parameters") or document
    n_layer, block_size = document["num_hidden_layers"], document["max_position_embeddings"]
    window = document.get("sliding_window") if document.get("use_sliding_window", True) else None
    window = window if window and window < block_size else None
    return _plain() | {
        "n_layer": n_layer,
        "n_head": document["num_attention_heads"],
        "n_kv_head": document.get("num_key_value_heads") or document["num_attention_heads"],
        "n_embd": document["hidden_size"],
        "head_dim": document.get("head_dim") or None,
        "n_hidden": document["intermediate_size"],
        "block_size": block_size,
        "position": "rope",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "norm": family.switches["norm"][0],
        "mlp": _mlp(document["hidden_act"]),
        "parallel_block": document.get("use_parallel_residual", family.switches["parallel_block"][0]),
        "qk_norm": document.get("qk_layernorm", family.switches["qk_norm"][0]),
        "window": window,
        "full_every": _full_every(document.get("layer_types"), n_layer) if window else None,
        "tie_weights": document.get("tie_word_embeddings", family.name in TIED_IF_SILENT),
        "vocab_size": document["vocab_size"],
    }


def _plain() -> dict[str, Any]:
    """The fields that most families do not have."""
    return {
        "rope_theta": 10000.0,
        "parallel_block": False,
        "qk_norm": False,
        "window": None,
        "full_every": None,
        "dropout": 0.0,
        "attention": "sdpa",
    }


def _mlp(activation: str) -> str:
    if activation not in MLPS:
        raise UserError(f"config.json has the activation {activation}, covered are {', '.join(MLPS)}")
    return MLPS[activation]


def _full_every(layer_types: list[str] | None, n_layer: int) -> int | None:
    """The period of layers that see everything; None where none does."""
    full = [i + 1 for i, kind in enumerate(layer_types or []) if kind == "full_attention"]
    if not full:
        return None
    if full != [*range(full[0], n_layer + 1, full[0])]:
        raise UserError("config.json has layer_types of full attention that are not every n-th")
    return full[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} not found: give a folder that transformers saved")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object")
    return document


def _read_tensors(folder: Path, family: HFFamily) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        path = folder / Path(name).name  # no path that leaves the folder
        if not path.exists():
            raise UserError(f"{path} not found: weights are read from safetensors alone")
        tensors |= load_tensors(path)
    _must_be_weights(folder, tensors)
    prefix = "transformer." if family.name == "gpt2" and "wte.weight" in tensors else ""  # the first files lack it
    return {prefix + name: tensor.float() for name, tensor in tensors.items() if not name.endswith(BUFFERS)}


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} has no weight_map of tensors to files")
    return sorted(set(files.values()))


def _must_be_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where tensors are quantized, or hold what is no number: both would load and compute nonsense."""
    for reason, odd in (
        ("quantized or of another type than float", [n for n, t in tensors.items() if t.dtype not in FLOATS]),
        ("not finite", [n for n, t in tensors.items() if t.dtype in FLOATS and not t.isfinite().all()]),
    ):
        if odd := sorted(name for name in odd if not name.endswith(BUFFERS)):
            raise UserError(f"{folder}: {len(odd)} tensors are {reason}, such as {odd[0]}")
