"""Generate token by token; everything else consumes this.  T tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from tinygpt.generate.sampling import Sampling, make_sampler
from tinygpt.model import GPT
from tinygpt.model.kv_cache import KVCache
from tinygpt.tokenizer import Tokenizer


def iter_ids(model: GPT, prompt: Sequence[int], sample: Callable[[Tensor], int]) -> Iterator[int]:
    """Ids that follow a prompt of at least one id, without end.

    When the context is full, its older half is forgotten and the newer half read again.
    """
    block_size, device = model.config.block_size, model.tok_emb.weight.device
    seen = list(prompt[-block_size:])
    while True:
        cache = KVCache(model.config, max_tokens=block_size, device=device)
        unread = seen
        while cache.n_seen + len(unread) <= block_size:
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([unread], device=device), cache)  # (1, T, C)
                next_id = sample(model.lm_head(hidden[0, -1]))
            yield next_id
            seen.append(next_id)
            unread = [next_id]
        seen = seen[-(block_size // 2 + 1) :]


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[str]:
    """Pieces of the text that follows the prompt, until `<|endoftext|>`; never half a character.

    The prompt begins a document: it is read behind the tokenizer's `bos_id`.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for next_id in islice(iter_ids(model, ids, make_sampler(sampling or Sampling())), max_new_tokens):
        if next_id == tokenizer.eos_id:
            break
        if piece := decoder.decode(tokenizer.decode_bytes([next_id])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, sampling: Sampling | None = None
) -> str:
    """The text that follows the prompt."""
    return "".join(stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling))
