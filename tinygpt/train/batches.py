"""Which tokens a step trains on: a pure function of the seed and the step, so resuming needs no other state.

N sequences, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinygpt.train.config import ContextWarmup

if TYPE_CHECKING:
    from tinygpt.tokens import TokenIds

MAX_GROUPS = 1 << 20  # of documents that are shuffled; each takes 24 bytes of memory
PIECE = 1 << 20  # ids searched at a time, so memory does not grow with the row


class Batches:
    """Batches of sequences from one row of tokens.

    The row begins and ends with the same token and is read as a ring. Each epoch cuts the ring at a random place,
    divides it into sequences of `seq_len` tokens and takes them in random order. So each token is a target once per
    epoch, except for a remainder of fewer than `seq_len`. Neither option changes this rule:

    context_warmup     the first steps split their sequences into shorter ones: the same tokens with less context
    shuffle_documents  each epoch has the documents in another order. Every occurrence of the row's first token begins a
                       document. If there are more than MAX_GROUPS documents, groups of neighbours stay together, so
                       memory does not grow with the row.
    """

    def __init__(
        self,
        tokens: TokenIds,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        context_warmup: ContextWarmup | None = None,
        shuffle_documents: bool = False,
    ) -> None:
        assert len(tokens) > seq_len, f"{len(tokens)} tokens are too few for one sequence of {seq_len}"
        self.tokens = tokens
        self.ring = len(tokens) - 1
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.context_warmup = context_warmup
        self.per_epoch = self.ring // seq_len  # sequences
        self._documents = document_starts(tokens, at_most=MAX_GROUPS) if shuffle_documents else None
        self._epoch: tuple[int, _Epoch] | None = None

    def batch_at(self, step: int) -> NDArray[np.int64]:
        """The sequences of one step, each with the token that follows it.  -> (N, T + 1) ids; N x T never changes"""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        seq_len = seq_len_at(step, self.seq_len, self.context_warmup)
        parts = []
        for number in range(first // self.per_epoch, (end - 1) // self.per_epoch + 1):
            epoch, before = self._epoch_of(number), number * self.per_epoch
            starts = epoch.cut + self.seq_len * epoch.order[max(first - before, 0) : end - before].astype(np.int64)
            starts = starts[:, None] + np.arange(0, self.seq_len, seq_len)
            places = (starts.reshape(-1, 1) + np.arange(seq_len + 1)) % self.ring
            parts.append(self.tokens[epoch.in_row(places)].astype(np.int64))
        return np.concatenate(parts)

    def _epoch_of(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != number:
            rng = np.random.default_rng([self.seed, number])
            self._epoch = number, _Epoch(rng, self.ring, self.per_epoch, self._documents)
        return self._epoch[1]


def seq_len_at(step: int, full: int, warmup: ContextWarmup | None) -> int:
    """Tokens in each sequence of a step, counted from 0.

    full 8, warmup {start: 2, steps: 10}  ->  2 at steps 0 to 4, 4 at steps 5 to 9, then 8
    """
    if warmup is None or step >= warmup.steps:
        return full
    n_doublings = (full // warmup.start).bit_length() - 1
    return warmup.start << (step * n_doublings // warmup.steps)


class _Epoch:
    """Where an epoch cuts the ring, and the order of its sequences and documents."""

    def __init__(self, rng: np.random.Generator, ring: int, n: int, documents: NDArray[np.int64] | None) -> None:
        self.cut = int(rng.integers(ring))
        self.order = np.arange(n, dtype=np.uint32)
        rng.shuffle(self.order)
        self.begins: NDArray[np.int64] | None = None  # where each document begins in this epoch's ring
        if documents is not None:
            shuffled = rng.permutation(len(documents))
            ends = np.cumsum(np.diff(documents, append=ring)[shuffled])
            self.begins = np.concatenate(([0], ends[:-1]))
            self.shift = documents[shuffled] - self.begins  # from the ring to the row

    def in_row(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in the ring -> places in the row of tokens, of the same shape."""
        if self.begins is None:
            return places
        return places + self.shift[np.searchsorted(self.begins, places, side="right") - 1]


def document_starts(tokens: TokenIds, *, at_most: int) -> NDArray[np.int64]:
    """Places of the `<|endoftext|>` before each document, or before every n-th where there are more than `at_most`.

    The row must begin with one. It is read twice, a piece at a time.
    """
    pieces = [(start, tokens[start : start + PIECE]) for start in range(0, len(tokens) - 1, PIECE)]
    pieces[-1] = pieces[-1][0], tokens[pieces[-1][0] : -1]  # the last <|endoftext|> begins no document
    every = -(-sum(int(np.count_nonzero(piece == tokens[0])) for _, piece in pieces) // at_most)
    found, n_seen = [], 0
    for start, piece in pieces:
        places = np.flatnonzero(piece == tokens[0])
        found.append(start + places[-n_seen % every :: every])
        n_seen += len(places)
    return np.concatenate(found)


def validation_sequences(tokens: TokenIds, seq_len: int, limit: int) -> NDArray[np.int64]:
    """Evenly spaced sequences of the validation split, about `limit` tokens together at most.

    So they come from all documents: the first ones alone can be much harder or easier, and with another vocabulary as
    many tokens would be another part of the text.  -> (N, seq_len + 1) ids, N at least 1
    """
    n_all = (len(tokens) - 1) // seq_len
    n = max(1, min(limit // seq_len, n_all))
    first = np.arange(n) * n_all // n * seq_len
    return tokens[first[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def on_device(ids: NDArray[np.int64], device: torch.device) -> Tensor:
    """A batch on the device."""
    batch = torch.from_numpy(ids)
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)  # only pinned memory is copied without waiting
    return batch.to(device)
