"""A model as one GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the gguf package.

llama.cpp's converter recognizes tokenizers by a list of hashes and refuses a home-trained one, so it is not used. Every
key that llama.cpp would otherwise guess is written: most wrong guesses load without an error and compute nonsense.
"""

import errno
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.config import GGUFType
from tinygpt.export.families import FULL, LLAMA_CPP, Family, family_of
from tinygpt.export.gguf_types import bits_per_weight, file_type, quantized, tensor_types
from tinygpt.export.layout import adapter_pairs, apply_layout, revert_layout
from tinygpt.files import atomic_write
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import filled_model, model_tensors, shapes_of
from tinygpt.tokenizer import Tokenizer

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# The reader demands merges, and the writer drops an empty list. No text ever uses this one: its symbols are longer
# than a byte, and no other merge makes them.
UNREACHABLE_MERGE = "xx yy"


class GGUFFile(NamedTuple):
    """What a written file holds."""

    family: str  # llama.cpp's architecture
    n_ctx: int  # tokens of context: fewer than the model's if the architecture lacks its window
    bits_per_weight: float
    types: dict[str, str]  # of each tensor

    def entry(self, n_bytes: int, measures: Mapping[str, float | None]) -> dict[str, Any]:
        """The entry for the file in reports/export.json."""
        return {
            "family": self.family,
            "context": self.n_ctx,
            "bytes": n_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            **measures,
            "tensors": dict(Counter(self.types.values())),
        }


def export_gguf(model: GPT, tokenizer: Tokenizer, path: str | Path, weight_type: GGUFType) -> GGUFFile:
    """Write one file, or none.  Raises UserError if llama.cpp has no such model, or weights exceed the type's range."""
    family, n_ctx = family_of(LLAMA_CPP, model.config)
    tensors = apply_layout(model_tensors(model), model.config, family.layout, n_ctx)
    shapes = shapes_of(tensors)
    types = tensor_types(shapes, model.config, weight_type)
    with atomic_write(path, "wb") as file:
        writer = GGUFWriter(file.name, family.name)
        _add_model(writer, model.config, family, n_ctx)
        _add_tokenizer(writer, tokenizer)
        writer.add_file_type(file_type(weight_type))
        writer.add_quantization_version(QUANTIZATION_VERSION)
        for name, tensor in tensors.items():
            _add_tensor(writer, name, tensor, types[name], weight_type)
        _write(writer)
    names = {name: kind.name.lower() for name, kind in types.items()}
    return GGUFFile(family.name, n_ctx, bits_per_weight(shapes, types), names)


def export_gguf_adapter(path: Path, adapter: Mapping[str, Tensor], config: GPTConfig, lora: Mapping[str, Any]) -> None:
    """Write an adapter for --lora, as llama.cpp's convert_lora_to_gguf.py does; `lora` has the training's params."""
    family, _ = family_of(LLAMA_CPP, config)
    with atomic_write(path, "wb") as file:
        writer = GGUFWriter(file.name, family.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora["alpha"])
        for name, (a, b) in adapter_pairs(adapter, config, family.layout).items():
            writer.add_tensor(f"{name}.weight.lora_a", a.detach().float().cpu().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", b.detach().float().cpu().numpy())
        _write(writer)


def read_gguf(path: str | Path, config: GPTConfig) -> GPT:
    """Read a file that export_gguf wrote for a model of `config`, as a model in float32.

    Its context is the file's. Its head is untied: in the file it may have another type than the embedding.
    """
    family, n_ctx = family_of(LLAMA_CPP, config)
    tensors = {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        for tensor in GGUFReader(path).tensors
    }
    if "output.weight" not in tensors:
        tensors["output.weight"] = tensors["token_embd.weight"]
    if n_ctx < config.block_size:
        config = replace(config, block_size=n_ctx, window=None, full_every=None)
    config = replace(config, tie_weights=False)
    return filled_model(config, revert_layout(tensors, config, family.layout))


def _add_model(writer: GGUFWriter, config: GPTConfig, family: Family, n_ctx: int) -> None:
    writer.add_name("tinygpt")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_dim)
    if config.window and family.switches["window"] != (FULL,):
        writer.add_logit_scale(1.0)
        writer.add_sliding_window(config.window)
        writer.add_sliding_window_pattern([config.window_of(i) is not None for i in range(config.n_layer)])


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    types = [TokenType.CONTROL if id in special else TokenType.NORMAL for id in range(tokenizer.vocab_size)]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # its pre-tokenizer; without the key llama.cpp uses another
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.merges] or [UNREACHABLE_MERGE])
    writer.add_bos_token_id(tokenizer.bos_id)  # without these two, token 11 ends every generation
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensor(
    writer: GGUFWriter, name: str, tensor: Tensor, kind: GGMLQuantizationType, weight_type: GGUFType
) -> None:
    """Rows are written as they are: ggml calls the same bytes (columns, rows)."""
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    try:
        with np.errstate(over="raise"):
            data = quantized(array, kind)
    except FloatingPointError:
        raise UserError(
            f"{name} has weights beyond the range of float16: drop {weight_type} from export.gguf"
        ) from None
    writer.add_tensor(name, data, raw_dtype=kind)


def _write(writer: GGUFWriter) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        error.errno = error.errno or errno.ENOSPC  # numpy reports a short write without its reason
        raise
    finally:
        writer.close()
