"""Our GGUF files next to those of llama.cpp's own quantizer: the type of every tensor, and every byte.

    python -m benchmarks.llama_quantizer libllama.so

takes llama.cpp's library as built by `cmake --build build --target llama`: no package from pip exports
llama_model_quantize. Each random model is written as F32, and llama.cpp quantizes that file to every other type.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from benchmarks.export_matrix import EOS, SIZES, random_model
from tinygpt.export.config import GGUFType
from tinygpt.export.families import LLAMA_CPP, find_family
from tinygpt.export.gguf import export_gguf
from tinygpt.export.gguf_types import WEIGHT_TYPES, file_type
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR

# Widths that fit K types and widths that do not, more layers than one rule looks at, every kind of MLP.
PLAIN: dict[str, Any] = SIZES | {
    "n_layer": 4, "n_kv_head": 4, "n_embd": 256, "n_hidden": 768, "position": "rope", "norm": "rmsnorm",
    "mlp": "swiglu", "parallel_block": False, "window": None, "full_every": None, "bias": "none", "qk_norm": False,
    "tie_weights": False,
}  # fmt: skip
GELU = {"norm": "layernorm", "mlp": "gelu", "n_hidden": 1024, "bias": "all"}
MODELS: dict[str, dict[str, Any]] = {
    "deep": {"n_layer": 10, "n_kv_head": 2},
    "tied": {"n_layer": 3, "tie_weights": True},
    "one key head of 8": {"n_layer": 9, "n_head": 8, "n_kv_head": 1},
    "rows of 160": {"n_head": 2, "n_kv_head": 2, "n_embd": 160, "n_hidden": 416},
    "rows of 90": {"n_head": 3, "n_kv_head": 3, "n_embd": 90, "n_hidden": 100},
    "learned": GELU | {"n_layer": 12, "position": "learned", "tie_weights": True},
    "gelu": GELU | {"n_layer": 8},
    "gelu, parallel": GELU | {"parallel_block": True},
    "layernorm": {"norm": "layernorm"},
    "parallel": {"parallel_block": True},
}


class QuantizeParams(ctypes.Structure):
    """The beginning of llama_model_quantize_params (include/llama.h of llama.cpp), and room for the rest."""

    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_char * 1024)]


class Quantizer:
    """llama_model_quantize of a build of llama.cpp."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.llama_model_quantize_default_params.restype = QuantizeParams
        self._library.llama_model_quantize.restype = ctypes.c_uint32

    def __call__(self, source: Path, target: Path, weight_type: GGUFType) -> None:
        """Quantize a file."""
        params = self._library.llama_model_quantize_default_params()
        params.nthread, params.ftype = 2, file_type(weight_type)
        failed = self._library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
        assert not failed, f"llama.cpp did not make {weight_type}"


def differing(model: GPT, weight_type: GGUFType, quantize: Quantizer, folder: Path) -> tuple[int, list[str]]:
    """The number of tensors, and the names of those that differ in their type or in a byte."""
    tokenizer = Tokenizer([*BYTE_TO_CHAR, EOS], [], {EOS: 256})
    export_gguf(model, tokenizer, folder / "f32.gguf", "f32")
    export_gguf(model, tokenizer, folder / "ours.gguf", weight_type)
    quantize(folder / "f32.gguf", folder / "theirs.gguf", weight_type)
    ours, theirs = ({t.name: t for t in GGUFReader(folder / name).tensors} for name in ("ours.gguf", "theirs.gguf"))
    differ = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if one.tensor_type != other.tensor_type or not np.array_equal(
            one.data.view(np.uint8), other.data.view(np.uint8)
        ):
            differ.append(f"{name} ({one.tensor_type.name} here, {other.tensor_type.name} there)")
    return len(ours), differ


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    quantize = Quantizer(parser.parse_args().library)
    print("| model | family | types | tensors in all | that differ |\n|---|---|---|---|---|")
    for name, changes in MODELS.items():
        model = random_model(GPTConfig(**PLAIN | changes))
        found = find_family(LLAMA_CPP.families, model.config)
        assert found
        n_tensor, differ = 0, list[str]()
        types = [weight_type for weight_type in WEIGHT_TYPES if weight_type != "f32"]
        with tempfile.TemporaryDirectory() as folder:
            for weight_type in types:
                n, names = differing(model, weight_type, quantize, Path(folder))
                n_tensor, differ = n_tensor + n, [*differ, *(f"{weight_type}: {entry}" for entry in names)]
        print(f"| {name} | {found[0].name} | {len(types)} | {n_tensor} | {len(differ)} |", *differ[:3], flush=True)


if __name__ == "__main__":
    main()
