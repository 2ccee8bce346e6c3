"""A model as one GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the gguf package.

llama.cpp's converter knows tokenizers by a list of hashes and refuses a home-trained one, so it is not used. Every key
is written that llama.cpp would otherwise guess, as most wrong guesses load without an error and compute nonsense.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import QuantError, quantize
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.config import GGUFType
from tinygpt.export.family import check_vocabulary, family_of
from tinygpt.export.layout import apply_layout
from tinygpt.files import atomic_write
from tinygpt.model import GPT, GPTConfig
from tinygpt.model.layers import NORM_EPS
from tinygpt.model.weights import model_tensors
from tinygpt.tokenizer import Tokenizer

FILE_TYPES: Mapping[GGUFType, tuple[LlamaFileType, GGMLQuantizationType]] = {
    "f32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
POSITIONS = "position_embd.weight"
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# The reader demands merges and the writer drops an empty list. No text reaches this one: its symbols are longer than
# a byte, and no other merge makes them.
UNREACHABLE_MERGE = "xx yy"


def gguf_name(weight_type: GGUFType) -> str:
    """The name of a file by its weight type."""
    return f"tinygpt-{weight_type}.gguf"


def export_gguf(model: GPT, tokenizer: Tokenizer, path: str | Path, weight_type: GGUFType) -> dict[str, str]:
    """Write one file, whole or not at all, and return the effective type of every tensor by name.

    Norms, biases and learned positions stay float32; a matrix that cannot be quantized becomes float16.
    Raises ParamsError when llama.cpp has no architecture for the model, UserError when the tokenizer is
    another or weights do not fit in the type.
    """
    check_vocabulary(model.config, tokenizer.vocab_size)
    family = family_of(model.config)
    tensors = apply_layout(model_tensors(model), model.config, family.gguf)
    with atomic_write(path, "wb") as file:
        writer = GGUFWriter(file.name, family.gguf_arch)
        _add_model(writer, model.config)
        _add_tokenizer(writer, tokenizer)
        _add_type(writer, weight_type)
        types = {name: _add_tensor(writer, name, tensor, weight_type) for name, tensor in tensors.items()}
        _write(writer)
    return types


def _add_model(writer: GGUFWriter, config: GPTConfig) -> None:
    writer.add_name("tinygpt")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(NORM_EPS)
    else:
        writer.add_layer_norm_eps(NORM_EPS)
    if config.position == "rope":
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_dim)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    types = [TokenType.CONTROL if id in special else TokenType.NORMAL for id in range(tokenizer.vocab_size)]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # the split before it; without the key llama.cpp takes another
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.merges] or [UNREACHABLE_MERGE])
    writer.add_bos_token_id(tokenizer.bos_id)  # without the two, token 11 ends every generation
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_type(writer: GGUFWriter, weight_type: GGUFType) -> None:
    writer.add_file_type(FILE_TYPES[weight_type][0])
    if weight_type == "q8_0":
        writer.add_quantization_version(QUANTIZATION_VERSION)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, weight_type: GGUFType) -> str:
    """Add one tensor and return its type.  Rows go in as they are: ggml names the same bytes (columns, rows)."""
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    kind = FILE_TYPES[weight_type][1]
    if array.ndim == 1 or name == POSITIONS:  # llama.cpp aborts on a bias or norm of another type
        kind = GGMLQuantizationType.F32
    try:
        with np.errstate(over="raise"):
            kind, data = _quantize(array, kind)
    except FloatingPointError:
        raise UserError(
            f"{name} has weights beyond the range of float16: drop {weight_type} from export.gguf"
        ) from None
    writer.add_tensor(name, data, raw_dtype=kind)
    return kind.name.lower()


def _quantize(array: NDArray[np.float32], kind: GGMLQuantizationType) -> tuple[GGMLQuantizationType, NDArray[Any]]:
    try:
        return kind, quantize(array, kind)
    except QuantError:  # q8_0 holds blocks of 32 and this row is no multiple of it
        return GGMLQuantizationType.F16, quantize(array, GGMLQuantizationType.F16)


def _write(writer: GGUFWriter) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        error.errno = error.errno or errno.ENOSPC  # numpy tells of a short write without its reason
        raise
    finally:
        writer.close()
