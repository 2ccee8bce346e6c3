"""Which type each tensor of a GGUF file gets, and its numbers in that type.

The rules are those of llama.cpp's own quantizer (src/llama-quant.cpp of https://github.com/ggml-org/llama.cpp, without
an importance matrix): more bits for the tensors that need them, and for rows that do not fill the blocks of a type the
nearest one of smaller blocks. The K types are computed by llama.cpp's kernels, the others by the gguf package.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray

from tinygpt.export.config import GGUFType
from tinygpt.export.llama_library import open_library
from tinygpt.model.config import ModelParams

Type = GGMLQuantizationType

# Rows that do not fill the blocks of the first get the second; where that does not fit either, F16.
FALLBACKS = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
K_TYPES = tuple(FALLBACKS)
FLOAT16_MAX = float(np.finfo(np.float16).max)


class Place(NamedTuple):
    """Where a matrix stands in a model."""

    layer: int
    n_layer: int
    n_head_per_kv: int  # query heads that share a key/value head


Rule = Callable[[Place], Type]  # the type of one kind of matrix


class Mix(NamedTuple):
    """The types of one kind of file: `base`, and others for the matrices whose names end as the rules say."""

    file_type: LlamaFileType
    base: Type
    rules: Mapping[str, Rule] = {}


def _better(worth_it: Callable[[Place], bool], better: Type, base: Type) -> Rule:
    return lambda place: better if worth_it(place) else base


def _always(kind: Type) -> Rule:
    return lambda place: kind


def _needs_more_bits(place: Place) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = place.n_layer // 8
    return place.layer < eighth or place.layer >= 7 * place.n_layer // 8 or (place.layer - eighth) % 3 == 2


def _first(n: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < n


def _first_part(n: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < place.n_layer // n


def _values(rule: Rule) -> dict[str, Rule]:
    """For the values, alone or fused with queries and keys."""
    return {"attn_v": rule, "attn_qkv": rule}


def _medium(base: Type) -> dict[str, Rule]:
    rule = _better(_needs_more_bits, Type.Q6_K, base)
    return _values(rule) | {"ffn_down": rule}


File = LlamaFileType
MIXES: Mapping[GGUFType, Mix] = {
    "f32": Mix(File.ALL_F32, Type.F32),
    "f16": Mix(File.MOSTLY_F16, Type.F16),
    "bf16": Mix(File.MOSTLY_BF16, Type.BF16),
    "q8_0": Mix(File.MOSTLY_Q8_0, Type.Q8_0),
    "q5_1": Mix(File.MOSTLY_Q5_1, Type.Q5_1),
    "q5_0": Mix(File.MOSTLY_Q5_0, Type.Q5_0),
    "q4_1": Mix(File.MOSTLY_Q4_1, Type.Q4_1),
    "q4_0": Mix(File.MOSTLY_Q4_0, Type.Q4_0),
    "q6_k": Mix(File.MOSTLY_Q6_K, Type.Q6_K),
    "q5_k_m": Mix(File.MOSTLY_Q5_K_M, Type.Q5_K, _medium(Type.Q5_K)),
    "q5_k_s": Mix(File.MOSTLY_Q5_K_S, Type.Q5_K),
    "q4_k_m": Mix(File.MOSTLY_Q4_K_M, Type.Q4_K, _medium(Type.Q4_K)),
    "q4_k_s": Mix(
        File.MOSTLY_Q4_K_S,
        Type.Q4_K,
        _values(_better(_first(4), Type.Q5_K, Type.Q4_K)) | {"ffn_down": _better(_first_part(8), Type.Q5_K, Type.Q4_K)},
    ),
    "q3_k_l": Mix(
        File.MOSTLY_Q3_K_L,
        Type.Q3_K,
        _values(_always(Type.Q5_K)) | {"ffn_down": _always(Type.Q5_K), "attn_output": _always(Type.Q5_K)},
    ),
    "q3_k_m": Mix(
        File.MOSTLY_Q3_K_M,
        Type.Q3_K,
        _values(_better(_first(2), Type.Q5_K, Type.Q4_K))
        | {"ffn_down": _better(_first_part(16), Type.Q5_K, Type.Q4_K), "attn_output": _always(Type.Q4_K)},
    ),
    "q3_k_s": Mix(File.MOSTLY_Q3_K_S, Type.Q3_K),
    "q2_k": Mix(
        File.MOSTLY_Q2_K,
        Type.Q2_K,
        _values(_better(lambda place: place.n_head_per_kv >= 4, Type.Q4_K, Type.Q3_K))
        | {"ffn_down": _always(Type.Q3_K), "attn_output": _always(Type.Q3_K)},
    ),
}


def tensor_types(shapes: Mapping[str, tuple[int, ...]], config: ModelParams, weight_type: GGUFType) -> dict[str, Type]:
    """The type of each tensor of a GGUF file, by its name there."""
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    return {
        name: _fitting(_wanted(name, shape, config, MIXES[weight_type], is_head=name == head), shape[-1])
        for name, shape in shapes.items()
    }


def _wanted(name: str, shape: tuple[int, ...], config: ModelParams, mix: Mix, *, is_head: bool) -> Type:
    if len(shape) == 1 or name.endswith("_norm.weight") or name == "position_embd.weight":
        return Type.F32  # llama.cpp aborts on a bias or norm of another type
    if mix.base in (Type.F32, Type.F16, Type.BF16):
        return mix.base
    if is_head:
        fits = shape[-1] % _block(mix.base) == 0
        return Type.Q6_K if fits and mix.base != Type.Q8_0 else Type.Q8_0
    found = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
    rule = mix.rules.get(found[2]) if found else None
    if found is None or rule is None:
        return mix.base
    return rule(Place(int(found[1]), config.n_layer, config.n_head // config.n_kv_head))


def _fitting(kind: Type, n_column: int) -> Type:
    """The type, or the one that takes its place in rows of that length."""
    for instead in (kind, FALLBACKS.get(kind, kind)):
        if n_column % _block(instead) == 0:
            return instead
    return Type.F16


def _block(kind: Type) -> int:
    return GGML_QUANT_SIZES[kind][0]


def bits_per_weight(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Type]) -> float:
    """Bits of the tensors over the numbers in them."""
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    bits = sum(n * 8 * GGML_QUANT_SIZES[types[name]][1] / _block(types[name]) for name, n in weights.items())
    return bits / sum(weights.values())


def quantized(array: NDArray[np.float32], kind: Type) -> NDArray[Any]:
    """A matrix or vector in a type, as the gguf package writes it: for block types (rows, bytes of a row).

    Raises FloatingPointError for numbers beyond what the type holds.
    """
    if kind not in K_TYPES:
        return quantize(array, kind)
    if np.abs(array).max(initial=0) > FLOAT16_MAX:
        raise FloatingPointError("scales are float16")
    n_row, n_column = array.shape
    size, n_bytes = GGML_QUANT_SIZES[kind]
    data = np.empty((n_row, n_column // size * n_bytes), np.uint8)
    source = np.ascontiguousarray(array)
    written = open_library().ggml_quantize_chunk(
        int(kind), source.ctypes.data_as(ctypes.c_void_p), data.ctypes.data, 0, n_row, n_column, None
    )
    assert written == data.nbytes, f"{kind.name}: {written} bytes for {data.nbytes}"
    return data
