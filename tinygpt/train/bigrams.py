"""A start that knows bigrams: before the first step, embeddings and head say which token follows which.

The blocks of a new model add nothing yet, so its logits are those of the newest token alone, head · norm(embedding).
These two matrices are made from counts of token pairs, by a truncated singular value decomposition, as Levy and
Goldberg make word vectors (https://papers.nips.cc/paper/5477). For a token a and the next one b:

    head_b · norm(embedding_a)  ≈  log(PRIOR · p_b + count_ab) + what all b have in common

V vocab_size, C n_embd, R rank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.model.gpt import GPT
from tinygpt.tokens import TokenIds

PRIOR = 20.0  # pairs that are added to those of each token, shared out as tokens are in the whole text
RMS = 0.2  # of an embedding's values: of 0.05 to 1, what trained best
MAX_TOKENS = 10_000_000  # counted, of a longer text in pieces taken evenly
N_PIECES = 100


@torch.no_grad()
def begin_with_bigrams(model: GPT, tokens: TokenIds) -> None:
    """Set the embeddings and the head of a new model. Where they are one matrix, it stays random."""
    if model.config.tie_weights:
        return
    n_vocab, n_embd = model.tok_emb.weight.shape
    ids = torch.from_numpy(taken_evenly(tokens).astype(np.int64))
    shares = (ids.bincount(minlength=n_vocab) + 1.0) / (len(ids) + n_vocab)
    left, right = factors(ids, shares, rank=min(n_embd - 2, n_vocab))
    # Two more columns. One makes all embeddings equally long, so that the norm divides each by the same number; one
    # has the same value in all, by which the head adds log(p_b).
    lengths = left.square().sum(1, keepdim=True)
    same = lengths.max().sqrt().expand(n_vocab, 1)
    embeddings = torch.cat([left, (same.square() - lengths).clamp(min=0).sqrt(), same], 1)
    log_shares = shares.log() - (shares * shares.log()).sum()
    head = torch.cat([right, torch.zeros(n_vocab, 1), log_shares[:, None] / same], 1)
    rms = same[0] * (2 / n_embd) ** 0.5
    for weight, values in (model.tok_emb.weight, embeddings / rms * RMS), (model.lm_head.weight, head * rms):
        weight.copy_(F.pad(values, (0, n_embd - values.size(1))))


def taken_evenly(tokens: TokenIds) -> TokenIds:
    """All of them, or MAX_TOKENS in pieces from the whole text."""
    if len(tokens) <= MAX_TOKENS:
        return tokens
    size = MAX_TOKENS // N_PIECES
    starts = np.linspace(0, len(tokens) - size, N_PIECES).astype(np.int64)
    return np.concatenate([tokens[start : start + size] for start in starts])


def factors(ids: Tensor, shares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ids, and each token's share of them (V,) -> two of (V, R), left · rightᵀ ≈ log(1 + count_ab / (PRIOR · p_b))

    They are closest where both tokens are frequent: the error of a pair is weighted by the root of both shares.
    """
    n_vocab, roots = len(shares), shares.sqrt()
    pairs, counts = (ids[:-1] * n_vocab + ids[1:]).unique(return_counts=True)
    first, second = pairs // n_vocab, pairs % n_vocab
    values = (counts / (PRIOR * shares[second])).log1p() * roots[first] * roots[second]
    shape = (n_vocab, n_vocab)
    weighted = torch.sparse_coo_tensor(torch.stack([first, second]), values, shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, scales, right = torch.svd_lowrank(weighted, q=rank, niter=2)
    return left * scales.sqrt() / roots[:, None], right * scales.sqrt() / roots[:, None]
