"""The order in which tokens are seen: a pure function of the seed and the step, so resuming needs nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinygpt.tokens import TokenIds


class Batches:
    """Batches of sequences out of one row of tokens.

    The row begins and ends with the same token and is read as a ring. An epoch cuts the ring from a random place on
    into sequences of `seq_len` tokens and takes them in random order, so each token is a target once an epoch, but
    for the fewer than `seq_len` that are over.
    """

    def __init__(self, tokens: TokenIds, *, seq_len: int, batch_size: int, seed: int) -> None:
        assert len(tokens) > seq_len, f"{len(tokens)} tokens are too few for one sequence of {seq_len}"
        self.tokens = tokens
        self.ring = len(tokens) - 1
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.per_epoch = self.ring // seq_len  # sequences
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batch_at(self, step: int) -> NDArray[np.int64]:
        """The sequences of one step, each with the token that follows it.  -> (batch_size, seq_len + 1) ids"""
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self._starts_of(n // self.per_epoch)[n % self.per_epoch] for n in numbers.tolist()]
        places = (np.array(starts)[:, None] + np.arange(self.seq_len + 1)) % self.ring
        return self.tokens[places].astype(np.int64)

    def _starts_of(self, epoch: int) -> NDArray[np.int64]:
        """Where the sequences of one epoch begin, in the order in which they are taken."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            cut = rng.integers(self.ring)
            self._epoch = epoch, cut + self.seq_len * rng.permutation(self.per_epoch)
        return self._epoch[1]
