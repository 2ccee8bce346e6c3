"""The first weights of a new model, where more is known than random numbers: pairs of tokens, and places.

The blocks of a new model add nothing yet, so its logits are those of the newest token alone, head · norm(embedding).
These two matrices are made from counts of token pairs, by a truncated singular value decomposition, as Levy and
Goldberg make word vectors (https://papers.nips.cc/paper/5477). For a token a and the next one b:

    head_b · norm(embedding_a)  ≈  log p_b + f_a · log(1 + count_ab / (PRIOR · p_b)) + what all b have in common

f_a is 1, or less for tokens whose vector would be longer than the root mean square. And some heads begin by looking at
the token one, two, three or four places before, which language models soon learn to do (Elhage et al.,
https://transformer-circuits.pub/2021/framework).

V vocab_size, C n_embd, D head_dim, R rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.model.attention import Attention
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT, Block
from tinygpt.model.layers import rope_tables

if TYPE_CHECKING:  # what it imports would be code of the weights
    from tinygpt.tokens import TokenIds

PRIOR = 20.0  # pairs that are added to those of each token, shared out as tokens are in the whole text
RMS = 0.2  # of an embedding's values: of 0.02 to 1, what trained best
MAX_TOKENS = 10_000_000  # counted, of a longer text in pieces taken evenly
N_PIECES = 100
MAX_RANK = 256  # more take minutes for a large vocabulary

N_BLOCKS = 2  # whose first heads look back, at most: half of the model's blocks stay random
MIN_HEAD_DIM = 16  # of heads that can: narrower ones repeat themselves every few places
DISTANCES = (1, 2, 3, 4)  # of one head each
N_PAIRS = 3  # of rope's that they use, the fastest: slower ones hardly change from one place to the next
SHARPNESS = 11.0  # their score at the right place; with 32 values 2.5 less at the next ones, 8 less at others nearby


def set_first_weights(model: GPT, tokens: TokenIds) -> None:
    """Set embeddings, head and early heads of a new model.

    All stay random where embeddings and head are one matrix or less than three wide, and the heads where they are
    narrow or positions are learned.
    """
    config = model.config
    if config.tie_weights or config.n_embd < 3:
        return
    column = set_bigrams(model, tokens)
    if config.position == "rope" and config.head_dim >= MIN_HEAD_DIM:
        for block in list(model.blocks)[: min(N_BLOCKS, config.n_layer // 2)]:
            look_back(cast(Block, block).attn, config, column)


# ---- embeddings and head ----


@torch.no_grad()
def set_bigrams(model: GPT, tokens: TokenIds) -> int:
    """Let the newest token decide the logits -> the column in which all embeddings have the same value."""
    n_vocab, n_embd = model.tok_emb.weight.shape
    ids = torch.from_numpy(taken_evenly(tokens).astype(np.int64))
    counts = ids.bincount(minlength=n_vocab)
    shares = (counts + 1.0) / (len(ids) + n_vocab)
    left, right = factors(ids, shares, rank=min(n_embd - 2, n_vocab, MAX_RANK))
    # No embedding is longer than the root mean square of all that occur: a few long ones would leave the others little.
    # Two more columns: one makes all equally long, so that the norm divides each by the same number; one has the same
    # value in all, by which the head adds log(p_b).
    squares = left.square().sum(1, keepdim=True)
    limit = squares.sum() / counts.count_nonzero()
    left = left * (limit / squares).sqrt().clamp(max=1)
    same = limit.sqrt().expand(n_vocab, 1)
    embeddings = torch.cat([left, (limit - squares).clamp(min=0).sqrt(), same], 1)
    log_shares = shares.log() - (shares * shares.log()).sum()
    head = torch.cat([right, torch.zeros(n_vocab, 1), log_shares[:, None] / same], 1)
    rms = same[0] * (2 / n_embd) ** 0.5
    for weight, values in (model.tok_emb.weight, embeddings / rms * RMS), (model.lm_head.weight, head * rms):
        weight.copy_(F.pad(values, (0, n_embd - values.size(1))))
    return embeddings.size(1) - 1


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


# ---- heads that look back ----


@torch.no_grad()
def look_back(attn: Attention, config: GPTConfig, column: int) -> None:
    """Let the first heads of a block attend to the tokens DISTANCES places before, whatever they are.

    From the column that is the same in all embeddings, keys get one vector and queries another, turned back by rope's
    angles of the distance. So a score depends on the distance alone, and is largest at this one. Further heads share
    the keys, and the longer queries where these are normed; their own queries stay random.
    """
    head_dim = config.head_dim
    cos, sin = (table[:, :N_PAIRS] for table in rope_tables(max(DISTANCES) + 1, head_dim, config.rope_theta))
    normed = math.sqrt(config.n_embd / 2)  # the column's value after the block's norm
    size = math.sqrt(SHARPNESS * math.sqrt(head_dim) / N_PAIRS) / normed
    queries, keys = (
        linear.weight.view(-1, 2, head_dim // 2, config.n_embd)[:, :, :N_PAIRS, column]
        for linear in (attn.q_proj, attn.k_proj)
    )
    keys[:, 0], keys[:, 1] = size, 0
    for query, distance in zip(queries, DISTANCES, strict=False):
        query[0], query[1] = size * cos[distance], -size * sin[distance]
    if config.qk_norm:  # which makes all queries √D long
        cast(Tensor, attn.q_norm.weight).mul_(SHARPNESS / math.sqrt(head_dim))
