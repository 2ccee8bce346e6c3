"""Initial weights that beat random ones: embeddings and output head from token pairs, and heads that look back.

The blocks of a new model add nothing yet, so its logits depend on the newest token alone. docs/theory.md explains how
pairs of tokens decide them. For a token a and the next token b:

    head_b · norm(embedding_a)  ≈  log p_b + f_a · log(1 + count_ab / (PRIOR · p_b)) + the same for all b

f_a is 1, or less for tokens whose vector would be longer than the root mean square.

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

if TYPE_CHECKING:  # a real import would count as code that decides weights
    from tinygpt.tokens import TokenIds

PRIOR = 20.0  # pairs added to each token's own, distributed like the tokens of the whole text
RMS = 0.2  # of an embedding's values: the best in training of those from 0.02 to 1
MAX_TOKENS = 10_000_000  # counted; from a longer text, in evenly spaced pieces
N_PIECES = 100
MAX_RANK = 256  # higher ranks take minutes for a large vocabulary

N_BLOCKS = 2  # with heads that look back, at most; at least half of all blocks stay random
MIN_HEAD_DIM = 16  # of heads that look back: scores of narrower ones repeat every few places
DISTANCES = (1, 2, 3, 4)  # places back, one for each head
N_PAIRS = 3  # of rope's pairs that they use, the fastest: slower ones hardly change from one place to the next
SHARPNESS = 11.0  # score at the right place; with head_dim 32, 2.5 less next to it, at least 8 less nearby


def set_first_weights(model: GPT, tokens: TokenIds) -> None:
    """Set the embeddings, the output head and the first attention heads of a new model.

    All stay random if embeddings and head are tied or fewer than three wide. The attention heads also stay random if
    they are narrow or positions are learned.
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
    # No embedding is longer than the root mean square of those that occur: a few long ones would leave little for the
    # others. Two more columns: one makes all equally long, so that the norm divides each by the same number; the other
    # has the same value in all, which lets the head add log(p_b).
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
    """All tokens, or MAX_TOKENS of them in evenly spaced pieces."""
    if len(tokens) <= MAX_TOKENS:
        return tokens
    size = MAX_TOKENS // N_PIECES
    starts = np.linspace(0, len(tokens) - size, N_PIECES).astype(np.int64)
    return np.concatenate([tokens[start : start + size] for start in starts])


def factors(ids: Tensor, shares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ids, each token's share of them (V,) -> two matrices (V, R), left · rightᵀ ≈ log(1 + count_ab / (PRIOR · p_b))

    The fit is closest where both tokens are frequent: a pair's error is weighted by the roots of both shares.
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
    """Let the first heads of a block attend to the tokens DISTANCES places back, whatever they are.

    The column that is the same in all embeddings gives every key the same vector, and a head's queries that vector
    rotated back by rope's angles for its distance. So scores depend on the distance alone, and are largest at the
    head's own. The other heads share the keys, and with qk_norm the longer queries; their query weights stay random.
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
    if config.qk_norm:  # it makes all queries √D long
        cast(Tensor, attn.q_norm.weight).mul_(SHARPNESS / math.sqrt(head_dim))
