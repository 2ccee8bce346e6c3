"""llama.cpp's C API in the shared library of the xllamacpp wheel: nothing to compile.

Struct layouts follow include/llama.h of llama.cpp. They change between builds and the library cannot tell, so one
version is pinned and the defaults it returns are checked field by field before anything else is called.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

from tinygpt.errors import UserError

XLLAMACPP_VERSION = "2026.10.11549"  # llama.cpp build b11549; the structs below were checked with it
LOG_LEVEL_ERROR, LOG_LEVEL_CONT = 4, 5  # enum ggml_log_level


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn", c_float * 4),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("eval_callback", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("callbacks", c_void_p * 3),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """struct llama_batch; null positions and sequence ids mean: go on with sequence 0."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


# What the pinned build returns: a field at another offset would read as something else.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "main_gpu": 0, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4,
    "rope_scaling_type": -1, "flash_attn_type": -1, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
    "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "n_samplers": 0,
}  # fmt: skip

# function: (result, arguments)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_backend_init": (None, []),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
}

_errors: deque[str] = deque(maxlen=4)  # llama.cpp's last error lines; its log is silent otherwise


def _log(level: int, text: bytes, _: object) -> None:
    if level == LOG_LEVEL_ERROR:
        _errors.append(text.decode(errors="replace").strip())
    elif level == LOG_LEVEL_CONT and _errors and text.strip():
        _errors[-1] += text.decode(errors="replace").rstrip()


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(_log)  # llama.cpp keeps the pointer: never collected


@functools.cache
def open_library() -> ctypes.CDLL:
    """Open llama.cpp once a process.  Raises UserError unless it is the build that the structs were checked with."""
    install = f"run `pip install xllamacpp=={XLLAMACPP_VERSION}`"
    try:
        import xllamacpp
        import xllamacpp.xllamacpp as extension
    except ImportError as error:
        raise UserError(f"GGUF files, as those of export.gguf, need llama.cpp ({error}): {install}") from None
    if xllamacpp.__version__ != XLLAMACPP_VERSION:
        raise UserError(f"xllamacpp {xllamacpp.__version__} has another layout of llama.cpp's structs: {install}")
    library = ctypes.CDLL(extension.__file__, mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _check_defaults(library.llama_model_default_params(), _MODEL_DEFAULTS)
    _check_defaults(library.llama_context_default_params(), _CONTEXT_DEFAULTS)
    library.llama_log_set(_LOG, None)
    library.llama_backend_init()
    return library


def _check_defaults(params: ctypes.Structure, expected: dict[str, Any]) -> None:
    found = {name: getattr(params, name) for name in expected}
    if found != expected:
        raise UserError(
            f"xllamacpp {XLLAMACPP_VERSION} on this platform reads {type(params).__name__} as {found}, "
            f"not as {expected}: set export.gguf to [] or export on Linux"
        )


def clear_errors() -> None:
    """Forget the errors of earlier calls."""
    _errors.clear()


def last_error() -> str:
    """Why the last call failed. The first line is the cause; those after it tell that loading failed."""
    return re.sub(r"^\w+: (error loading model: )?(\w+: )?", "", _errors[0]) if _errors else "no reason given"
