"""Tokens, logits and greedy choices of real llama.cpp, from the xllamacpp wheel's shared library: nothing to compile.

Struct layouts follow include/llama.h of llama.cpp. They change between builds, and the library does not report it, so
one version is pinned. A file that contradicts itself aborts the process, so each file is first tried in another
process. That is why nothing here imports PyTorch.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError, program

XLLAMACPP_VERSION = "2026.10.11549"  # llama.cpp build b11549; the structs below were checked with it
LOG_LEVEL_ERROR, LOG_LEVEL_CONT = 4, 5  # enum ggml_log_level
F32 = 0  # enum ggml_type
N_BATCH = 512  # tokens per call of llama_decode: limits the memory for logits
MOST_SECONDS = 600  # for the trial of a file
TRIAL = "import sys; sys.path[:0] = sys.argv[1:2]; from tinygpt.export.llamacpp import try_out; try_out(*sys.argv[2:])"


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        *_fields(c_void_p, "devices tensor_buft_overrides"),
        *_fields(c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        *_fields(c_void_p, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        *_fields(c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = (
        *_fields(c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        *_fields(c_int32, "n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type"),
        *_fields(c_int32, "flash_attn_type"),
        *_fields(c_float, "rope_freq_base rope_freq_scale yarn_ext yarn_attn yarn_fast yarn_slow"),
        *_fields(c_uint32, "yarn_orig_ctx"),
        *_fields(c_float, "defrag_thold"),
        *_fields(c_void_p * 2, "eval_callback"),
        *_fields(c_int32, "type_k type_v"),
        *_fields(c_void_p * 3, "callbacks"),
        *_fields(c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        *_fields(c_void_p, "samplers"),
        *_fields(c_size_t, "n_samplers"),
        *_fields(c_void_p, "ctx_other"),
    )


class Batch(ctypes.Structure):
    """struct llama_batch; null positions and sequence ids mean: continue sequence 0."""

    _fields_ = (
        *_fields(c_int32, "n_tokens"),
        *_fields(c_void_p, "token embd pos n_seq_id seq_id logits"),
    )


# result, arguments, functions
_SIGNATURES: tuple[tuple[Any, list[Any], str], ...] = (
    (None, [], "llama_backend_init"),
    (ModelParams, [], "llama_model_default_params"),
    (ContextParams, [], "llama_context_default_params"),
    (None, [c_void_p], "llama_model_free llama_free"),
    (c_void_p, [c_void_p], "llama_model_get_vocab llama_get_memory"),
    (c_int32, [c_void_p], "llama_model_n_ctx_train llama_vocab_n_tokens llama_vocab_bos llama_vocab_eos"),
    (POINTER(c_float), [c_void_p], "llama_get_logits"),
    (c_void_p, [c_char_p, ModelParams], "llama_model_load_from_file"),
    (c_void_p, [c_void_p, ContextParams], "llama_init_from_model"),
    (None, [c_void_p, c_bool], "llama_memory_clear"),
    (c_int32, [c_void_p, Batch], "llama_decode"),
    (c_bool, [c_void_p, c_int32], "llama_vocab_is_eog"),
    (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool], "llama_tokenize"),
    (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool], "llama_token_to_piece"),
    (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p], "ggml_quantize_chunk"),
)

_errors: deque[str] = deque(maxlen=4)  # llama.cpp's last error lines; its log is silent otherwise


def _log(level: int, text: bytes, _: object) -> None:
    if level == LOG_LEVEL_ERROR:
        _errors.append(text.decode(errors="replace").strip())
    elif level == LOG_LEVEL_CONT and _errors and text.strip():
        _errors[-1] += text.decode(errors="replace").rstrip()


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(_log)  # llama.cpp keeps the pointer: keep this alive


@functools.cache
def open_library() -> ctypes.CDLL:
    """Open llama.cpp once per process.  Raises UserError unless it is the build that the structs were checked with."""
    install = f"run `pip install xllamacpp=={XLLAMACPP_VERSION}`"
    try:
        import xllamacpp
        import xllamacpp.xllamacpp as extension
    except ImportError as error:
        raise UserError(f"GGUF files, such as those of export.gguf, need llama.cpp ({error}): {install}") from None
    if xllamacpp.__version__ != XLLAMACPP_VERSION:
        raise UserError(f"xllamacpp {xllamacpp.__version__} lays out llama.cpp's structs differently: {install}")
    library = ctypes.CDLL(extension.__file__, mode=ctypes.RTLD_GLOBAL)
    for result, arguments, names in _SIGNATURES:
        for function in (getattr(library, name) for name in names.split()):
            function.restype, function.argtypes = result, arguments
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else, when it aborts, a debugger prints hundreds of lines
    library.llama_log_set(_LOG, None)
    library.llama_backend_init()
    return library


def _last_error() -> str:
    """Why the last call failed. The first line is the cause; the others only say that loading failed."""
    return re.sub(r"^\w+: (error loading model: )?(\w+: )?", "", _errors[0]) if _errors else "no reason given"


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """A GGUF file open in llama.cpp on the CPU, with float32 keys and values and without flash attention.

    `n_ctx` is the longest sequence in tokens (None: the model's own). Raises UserError with llama.cpp's reason when it
    cannot load the file. Use it in a `with`.
    """

    def __init__(self, path: str | Path, *, n_ctx: int | None = None, n_threads: int = 1) -> None:
        self._lib, self._model, self._context, self._path = open_library(), None, None, Path(path)
        self._model = self._load()
        self._n_token = 0  # of the sequence so far
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.eos_id: int = self._lib.llama_vocab_eos(self._vocab)  # -1 where the file names none
        bos_id: int = self._lib.llama_vocab_bos(self._vocab)
        self.bos_id = bos_id if bos_id >= 0 else self.eos_id
        # llama.cpp only warns past the trained context, and learned positions abort the process there
        n_ctx_train = self._lib.llama_model_n_ctx_train(self._model)
        self.n_ctx: int = min(n_ctx or n_ctx_train, n_ctx_train)
        if self.n_ctx < 1:
            self.close()
            raise UserError(f"{path} is damaged (it has a context of {n_ctx_train} tokens): recreate it")
        self._context = self._open_context(n_threads)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and everything that belongs to it."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; the names of special tokens in it are plain text, and nothing is added."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 1))()  # no token is empty
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:n])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; special tokens give their names."""
        return b"".join(map(self._piece, ids))

    def eog_ids(self) -> list[int]:
        """The tokens that end a generation in llama.cpp."""
        return [id for id in range(self.vocab_size) if self._lib.llama_vocab_is_eog(self._vocab, id)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of a new sequence.  (T,) -> (T, V)"""
        return np.concatenate([*self._read(ids)])

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` likeliest tokens after `ids`, one at a time with the KV cache; end-of-text does not stop it."""
        new = [int(self.read(ids).argmax())]
        while len(new) < n:
            new.append(int(self.append(new[-1]).argmax()))
        return new

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after the last token of a new sequence.  (T,) -> (V,)"""
        *_, last = self._read(ids, n_logits=1)
        return last[-1]

    def append(self, id: int) -> NDArray[np.float32]:
        """Logits after one more token of the sequence.  -> (V,)"""
        return self._decode([id])[-1]

    def _piece(self, id: int) -> bytes:
        size = -self._lib.llama_token_to_piece(self._vocab, id, None, 0, 0, True)  # the size that would have fit
        buffer = ctypes.create_string_buffer(max(size, 1))
        n = self._lib.llama_token_to_piece(self._vocab, id, buffer, size, 0, True)
        return buffer.raw[: max(n, 0)]

    def _load(self) -> int:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.check_tensors = True  # refuses NaN and infinity in the weights
        _errors.clear()
        model: int | None = self._lib.llama_model_load_from_file(os.fsencode(self._path), params)
        if not model:
            raise UserError(f"llama.cpp cannot load {self._path} ({_last_error()}): if it is damaged, recreate it")
        return model

    def _open_context(self, n_threads: int) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.n_ctx, N_BATCH, N_BATCH
        params.n_outputs_max_per_seq = 0  # as many as a batch holds
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0  # disabled: on the CPU it multiplies in float16
        params.offload_kqv = params.op_offload = False
        context: int | None = self._lib.llama_init_from_model(self._model, params)
        if not context:
            self.close()
            raise UserError(f"llama.cpp cannot make a context of {self.n_ctx} tokens for {self._path}: {_last_error()}")
        return context

    def _read(self, ids: Sequence[int], n_logits: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Start a new sequence, and yield the logits of `_decode` for each batch."""
        self._n_token = 0
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for start in range(0, max(1, len(ids)), N_BATCH):
            yield self._decode(ids[start : start + N_BATCH], n_logits)

    def _decode(self, ids: Sequence[int], n_logits: int | None = None) -> NDArray[np.float32]:
        """Append up to N_BATCH tokens to the sequence.  (T,) -> logits after the last `n_logits` (None: all), (…, V)"""
        if not all(0 <= id < self.vocab_size for id in ids):
            raise ValueError(f"token ids must be below {self.vocab_size}")
        n, n_logits = len(ids), n_logits or len(ids)
        self._n_token += n
        if not 0 < self._n_token <= self.n_ctx:
            raise ValueError(f"a sequence of {self._n_token} tokens, but the context is {self.n_ctx}")
        tokens, has_logits = (c_int32 * n)(*ids), (c_int8 * n)(*[0] * (n - n_logits), *[1] * n_logits)
        batch = Batch(n_tokens=n, token=ctypes.addressof(tokens), logits=ctypes.addressof(has_logits))
        if status := self._lib.llama_decode(self._context, batch):
            raise UserError(f"llama.cpp cannot run {self._path} (status {status}: {_last_error()})")
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (n_logits, self.vocab_size)).copy()


def open_gguf(path: Path, *, n_ctx: int | None = None, n_threads: int = 1) -> LlamaCpp:
    """Open a file after a trial.  Raises UserError with llama.cpp's reason if it cannot be used."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: give a .gguf file")
    command = [sys.executable, "-c", TRIAL, str(Path(__file__).parents[2]), str(path), str(n_ctx or "")]
    try:
        tried = subprocess.run(command, capture_output=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"llama.cpp did not finish with {path} in {MOST_SECONDS} s: the file may be damaged") from None
    if tried.returncode:
        if path.exists() and is_adapter(path):
            raise UserError(f"{path} has adapters alone: give the model with them, such as data/model")
        said = [*tried.stderr.decode(errors="replace").splitlines(), "no reason given"]
        if reported := [line for line in said if line.startswith("error: ")]:
            raise UserError(reported[0].removeprefix("error: "))
        reason = re.sub(r"^\S*/", "", said[0])  # without the path of the source file
        raise UserError(f"llama.cpp aborts on {path} ({reason}), which is damaged or inconsistent: recreate it")
    return LlamaCpp(path, n_ctx=n_ctx, n_threads=n_threads)


def is_adapter(path: Path) -> bool:
    """Whether the beginning of a GGUF file, which says what it is, has a key of adapters."""
    with path.open("rb") as file:
        return b"adapter.lora.alpha" in file.read(10_000)


@program
def try_out(path: str, n_ctx: str) -> None:
    """Make every call that may abort on a bad file."""
    with LlamaCpp(path, n_ctx=int(n_ctx) if n_ctx else None) as llama:
        llama.encode("A text, 1\n")
        llama.greedy([0], min(2, llama.n_ctx))
        llama.decode_bytes({*llama.eog_ids(), *range(llama.vocab_size)})
