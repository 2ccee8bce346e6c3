"""The types in a GGUF file: which one each tensor gets, its numbers in that type, and how exact they must be.

The rules are those of llama.cpp's own quantizer (src/llama-quant.cpp of https://github.com/ggml-org/llama.cpp, without
an importance matrix): more bits for the tensors that need them, and the nearest type with smaller blocks for rows that
do not fill the blocks of a type.
"""

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
from tinygpt.export.llamacpp import open_library
from tinygpt.model.config import ModelParams

Type = GGMLQuantizationType

# The type for rows that do not fill the blocks of another; if they do not fill its blocks either, F16.
FALLBACKS = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
FLOAT16_MAX = float(np.finfo(np.float16).max)


class Tolerance(NamedTuple):
    """The largest differences that llama.cpp's arithmetic and the rounding of weights can explain."""

    logprob: float  # largest difference of a log-probability, over all tokens at all positions
    ppl: float  # relative difference of perplexity
    weight: float  # relative error of a tensor, in the 2-norm


# PyTorch, too, computes with the weights in the file, so the first two are about arithmetic: with float32 only rounding
# and, for GELU, ggml's float16 table differ; the other types also round activations, all quantized ones the same way.
# docs/export.md has the largest differences seen; the rest is room for deeper models. A wrong layout is off by whole
# units, and it doubles the perplexity of a trained model.
EXACT, GELU_TABLE = Tolerance(1e-3, 1e-4, 0.0), Tolerance(3e-2, 1e-3, 0.0)
F16, BF16 = Tolerance(0.1, 1e-3, 1e-3), Tolerance(0.6, 5e-3, 4e-3)
# Rounding to so few bits changes Gaussian weights by a third to a half of this share of their norm, and blocks with one
# value far above the others, as initial weights have, by up to four fifths: √32 / (127 √12) for 32 values in 8 bits.
Q8, Q6, Q5, Q4, Q3, Q2 = (Tolerance(2.0, 2e-2, weight) for weight in (0.016, 0.045, 0.13, 0.26, 0.38, 0.6))


class Rule(NamedTuple):
    """Matrices with these names get this type in the layers, counted from 0, for which `when` holds."""

    names: tuple[str, ...]
    type: Type
    when: Callable[[int, ModelParams], bool] = lambda layer, config: True


class WeightType(NamedTuple):
    """A kind of file: a matrix gets the type of the first rule that holds, or `base` if none does."""

    base: Type
    tolerance: Tolerance
    rules: tuple[Rule, ...] = ()


def _needs_more_bits(layer: int, config: ModelParams) -> bool:
    """The first and last eighth of the layers, and every third one in between."""
    eighth = config.n_layer // 8
    return layer < eighth or layer >= 7 * config.n_layer // 8 or (layer - eighth) % 3 == 2


VALUES, DOWN = ("attn_v", "attn_qkv"), ("ffn_down",)  # values alone, or fused with queries and keys
NEEDY = (*VALUES, *DOWN, "attn_output")
MEDIUM = (Rule((*VALUES, *DOWN), Type.Q6_K, _needs_more_bits),)
WEIGHT_TYPES: dict[GGUFType, WeightType] = {
    "f32": WeightType(Type.F32, EXACT),
    "f16": WeightType(Type.F16, F16),
    "bf16": WeightType(Type.BF16, BF16),
    "q8_0": WeightType(Type.Q8_0, Q8),
    "q5_1": WeightType(Type.Q5_1, Q5),
    "q5_0": WeightType(Type.Q5_0, Q5),
    "q4_1": WeightType(Type.Q4_1, Q4),
    "q4_0": WeightType(Type.Q4_0, Q4),
    "q6_k": WeightType(Type.Q6_K, Q6),
    "q5_k_m": WeightType(Type.Q5_K, Q5, MEDIUM),
    "q5_k_s": WeightType(Type.Q5_K, Q5),
    "q4_k_m": WeightType(Type.Q4_K, Q4, MEDIUM),
    "q4_k_s": WeightType(
        Type.Q4_K,
        Q4,
        (
            Rule(VALUES, Type.Q5_K, lambda layer, config: layer < 4),
            Rule(DOWN, Type.Q5_K, lambda layer, config: layer < config.n_layer // 8),
        ),
    ),
    "q3_k_l": WeightType(Type.Q3_K, Q3, (Rule(NEEDY, Type.Q5_K),)),
    "q3_k_m": WeightType(
        Type.Q3_K,
        Q3,
        (
            Rule(VALUES, Type.Q5_K, lambda layer, config: layer < 2),
            Rule(DOWN, Type.Q5_K, lambda layer, config: layer < config.n_layer // 16),
            Rule(NEEDY, Type.Q4_K),
        ),
    ),
    "q3_k_s": WeightType(Type.Q3_K, Q3),
    "q2_k": WeightType(
        Type.Q2_K,
        Q2,
        (Rule(VALUES, Type.Q4_K, lambda _, config: config.n_head >= 4 * config.n_kv_head), Rule(NEEDY, Type.Q3_K)),
    ),
}


def file_type(weight_type: str) -> LlamaFileType:
    """llama.cpp's number for this kind of file."""
    return LlamaFileType[f"{'ALL' if weight_type == 'f32' else 'MOSTLY'}_{weight_type.upper()}"]


def tolerance(mlp: str, weight_type: GGUFType) -> Tolerance:
    """The tolerance for a kind of MLP and a type of weights."""
    floor = GELU_TABLE if mlp == "gelu" else EXACT
    return Tolerance(*map(max, WEIGHT_TYPES[weight_type].tolerance, floor))


def tensor_types(shapes: Mapping[str, tuple[int, ...]], config: ModelParams, weight_type: GGUFType) -> dict[str, Type]:
    """The type of each tensor in a GGUF file, by its name there."""
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    kind = WEIGHT_TYPES[weight_type]
    return {
        name: _fitting(_chosen(name, shape, config, kind, is_head=name == head), shape[-1])
        for name, shape in shapes.items()
    }


def _chosen(name: str, shape: tuple[int, ...], config: ModelParams, file: WeightType, *, is_head: bool) -> Type:
    if len(shape) == 1 or name.endswith("_norm.weight") or name == "position_embd.weight":
        return Type.F32  # llama.cpp aborts on a bias or norm of another type
    if file.base in (Type.F32, Type.F16, Type.BF16):
        return file.base
    if is_head:
        fits = shape[-1] % _block(file.base) == 0
        return Type.Q6_K if fits and file.base != Type.Q8_0 else Type.Q8_0
    if found := re.match(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, name = int(found[1]), found[2]
        return next((rule.type for rule in file.rules if name in rule.names and rule.when(layer, config)), file.base)
    return file.base


def _fitting(kind: Type, n_column: int) -> Type:
    """The type, or the one that replaces it for rows of that length."""
    for instead in (kind, FALLBACKS.get(kind, kind)):
        if n_column % _block(instead) == 0:
            return instead
    return Type.F16


def _block(kind: Type) -> int:
    return GGML_QUANT_SIZES[kind][0]


def bits_per_weight(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Type]) -> float:
    """The mean bits of a number, over all tensors."""
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    bits = sum(n * 8 * GGML_QUANT_SIZES[types[name]][1] / _block(types[name]) for name, n in weights.items())
    return bits / sum(weights.values())


def quantized(array: NDArray[np.float32], kind: Type) -> NDArray[Any]:
    """A matrix or vector in a type; in block types its shape is (rows, bytes of a row).

    The gguf package converts it or, if that can only read the type, llama.cpp's kernels do.  Raises FloatingPointError
    for numbers beyond the range of the type.
    """
    try:
        return quantize(array, kind)
    except NotImplementedError:
        pass
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
