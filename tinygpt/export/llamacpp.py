"""Real llama.cpp on a GGUF file: its tokens, its logits, its greedy choices."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int8, c_int32, c_void_p, create_string_buffer
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.export.llama_library import Batch, clear_errors, last_error, open_library

N_BATCH = 512  # tokens a call of llama_decode: bounds the memory for logits
F32 = 0  # enum ggml_type


class LlamaCpp:
    """A GGUF file open in llama.cpp on the CPU, with float32 keys and values and without flash attention.

    `n_ctx` is the longest sequence in tokens (None: the model's own). With `vocab_only` no weights are read and only
    the tokenizer works. Raises UserError with llama.cpp's reason when it cannot load the file. Use it in a `with`.
    """

    def __init__(
        self, path: str | Path, *, n_ctx: int | None = None, n_threads: int = 1, vocab_only: bool = False
    ) -> None:
        self._lib, self._model, self._context = open_library(), None, None
        self._model = self._load(Path(path), vocab_only)
        self._n_token = 0  # of the sequence so far
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos_id: int = self._lib.llama_vocab_bos(self._vocab)  # -1 where the file names none
        self.eos_id: int = self._lib.llama_vocab_eos(self._vocab)
        # llama.cpp only warns past the trained context, and learned positions abort the process there
        n_ctx_train = 0 if vocab_only else self._lib.llama_model_n_ctx_train(self._model)
        self.n_ctx: int = min(n_ctx or n_ctx_train, n_ctx_train)
        if not vocab_only:
            self._context = self._open_context(n_threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and everything that belongs to it."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def apply_lora(self, path: Path) -> None:
        """Use an adapter from now on.  Raises UserError when it does not fit the model."""
        clear_errors()
        adapter = self._lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise UserError(f"llama.cpp cannot apply {path}: {last_error()}")
        status = self._lib.llama_set_adapters_lora(self._context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
        assert status == 0, f"llama_set_adapters_lora returned {status}"

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; the names of special tokens in it are plain text, and nothing is added."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 1))()  # no token is empty
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:n])

    def piece(self, id: int) -> bytes:
        """The bytes that one token stands for; special tokens give their names."""
        size = -self._lib.llama_token_to_piece(self._vocab, id, None, 0, 0, True)  # the size that would have fit
        buffer = create_string_buffer(max(size, 1))
        n = self._lib.llama_token_to_piece(self._vocab, id, buffer, size, 0, True)
        return buffer.raw[: max(n, 0)]

    def eog_ids(self) -> list[int]:
        """The tokens that end a generation in llama.cpp."""
        return [id for id in range(self.vocab_size) if self._lib.llama_vocab_is_eog(self._vocab, id)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of one sequence, which starts anew.  (T,) -> (T, V)"""
        self._restart(len(ids))
        parts = [self._decode(ids[start : start + N_BATCH]) for start in range(0, len(ids), N_BATCH)]
        return np.concatenate(parts)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` likeliest tokens after `ids`, one at a time with the KV cache; end-of-text does not stop it."""
        self._must_fit(len(ids) + n - 1)
        new = [int(self.read(ids).argmax())]
        while len(new) < n:
            new.append(int(self.append(new[-1]).argmax()))
        return new

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after the last token of one sequence, which starts anew.  (T,) -> (V,)"""
        self._restart(len(ids))
        for start in range(0, len(ids), N_BATCH):
            last = self._decode(ids[start : start + N_BATCH], n_logits=1)[-1]
        return last

    def append(self, id: int) -> NDArray[np.float32]:
        """Logits after one more token of the sequence.  -> (V,)"""
        self._must_fit(self._n_token + 1)
        return self._decode([id])[-1]

    def _load(self, path: Path, vocab_only: bool) -> int:
        params = self._lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocab_only, 0
        params.check_tensors = True  # refuses NaN and infinity in the weights
        clear_errors()
        model: int | None = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise UserError(f"llama.cpp cannot load {path} ({last_error()}): if it is damaged, make it again")
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
            raise UserError(f"llama.cpp cannot make a context of {self.n_ctx} tokens: {last_error()}")
        return context

    def _restart(self, n_token: int) -> None:
        self._must_fit(n_token)
        self._n_token = 0
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _must_fit(self, n_token: int) -> None:
        if not 0 < n_token <= self.n_ctx:
            raise ValueError(f"a sequence of {n_token} tokens, but the context is {self.n_ctx}")

    def _decode(self, ids: Sequence[int], n_logits: int | None = None) -> NDArray[np.float32]:
        """Append up to N_BATCH tokens to the sequence.  (T,) -> logits after the last `n_logits` (None: all), (…, V)"""
        if not all(0 <= id < self.vocab_size for id in ids):
            raise ValueError(f"token ids must be below {self.vocab_size}")
        n = len(ids)
        n_logits = n_logits or n
        self._n_token += n
        wanted = (c_int8 * n)(*[0] * (n - n_logits), *[1] * n_logits)
        batch = Batch(n_tokens=n, token=(c_int32 * n)(*ids), logits=wanted)
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}: {last_error()}")
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (n_logits, self.vocab_size)).copy()
