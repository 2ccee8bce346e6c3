"""The first weights of a new model, where more is known than random numbers: pairs of tokens, and places.

The blocks of a new model add nothing yet, so its logits are those of the newest token alone, head · norm(embedding).
These two matrices are made from counts of token pairs, by a truncated singular value decomposition, as Levy and
Goldberg make word vectors (https://papers.nips.cc/paper/5477). For a token a and the next one b:

    head_b · norm(embedding_a)  ≈  log p_b + f_a · log(1 + count_ab / (PRIOR · p_b)) + what all b have in common

f_a is 1, or less for tokens whose vector would be longer than most. Some heads begin by looking at the token one, two,
three or four places before, which language models soon learn to do (Elhage et al.,
https://transformer-circuits.pub/2021/framework). Those of the first block add what this token says of the next one.

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
from tinygpt.model.gpt import GPT, INIT_STD, Block
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

N_FITTED = 131_072  # tokens that values are fitted on
MAX_VOCAB = 20_000  # more take minutes
STEP = 0.2  # of Newton's: each head is fitted as if it were alone
RIDGE = 0.1  # of the mean variance, added to that of each direction


def set_first_weights(model: GPT, tokens: TokenIds) -> None:
    """Set embeddings, head and early heads of a new model.

    All stay random where embeddings and head are one matrix or less than three wide, and the heads where they are
    narrow or positions are learned.
    """
    config = model.config
    if config.tie_weights or config.n_embd < 3:
        return
    column = set_bigrams(model, tokens)
    if config.position == "learned" or config.head_dim < MIN_HEAD_DIM or config.n_layer < 2:
        return
    for block in list(model.blocks)[: min(N_BLOCKS, config.n_layer // 2)]:
        look_back(cast(Block, block).attn, config, column)
    if config.vocab_size <= MAX_VOCAB and len(tokens) > max(DISTANCES) + 1:
        fit_values(model, tokens)


# ---- embeddings and head ----


@torch.no_grad()
def set_bigrams(model: GPT, tokens: TokenIds) -> int:
    """Let the newest token decide the logits -> the column in which all embeddings have the same value."""
    n_vocab, n_embd = model.tok_emb.weight.shape
    ids = torch.from_numpy(taken_evenly(tokens).astype(np.int64))
    counts = ids.bincount(minlength=n_vocab)
    shares = (counts + 1.0) / (len(ids) + n_vocab)
    left, right = factors(ids, shares, rank=min(n_embd - 2, n_vocab, MAX_RANK))
    # No embedding is longer than those of the text's tokens are on average: a few long ones would leave the others
    # little. Two more columns: one makes all equally long, so that the norm divides each by the same number; one has
    # the same value in all, by which the head adds log(p_b).
    squares = left.square().sum(1, keepdim=True)
    longest = squares.sum() / counts.count_nonzero()
    left = left * (longest / squares).sqrt().clamp(max=1)
    same = longest.sqrt().expand(n_vocab, 1)
    embeddings = torch.cat([left, (longest - squares).clamp(min=0).sqrt(), same], 1)
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


@torch.no_grad()
def fit_values(model: GPT, tokens: TokenIds) -> None:
    """Let the first heads of the first block add what the token they look at says of the next one.

    It is a part of one Newton step. With r, how far the target's row of the head is from the mean that the model
    expects, and z, the block's normed input at the token looked at, the product of a head's output and value weights
    becomes

        E[r rᵀ]⁻¹ · E[r zᵀ] · E[z zᵀ]⁻¹

    as nearly as D columns can. Of heads that share values the first one is set.
    """
    config, block = model.config, cast(Block, model.blocks[0])
    inputs, head = block.attn_norm(model.tok_emb.weight), model.lm_head.weight
    expected = torch.cat([(rows @ head.T).softmax(1) @ head for rows in model.norm(model.tok_emb.weight).split(1024)])
    first, last = max(DISTANCES), len(tokens) - 2
    places = np.linspace(first, last, min(N_FITTED, last - first + 1)).astype(np.int64)

    def at(shift: int) -> Tensor:
        return torch.from_numpy(tokens[places + shift].astype(np.int64))

    residuals = (head[at(1)] - expected[at(0)]) / math.sqrt(len(places))
    shares = at(0).bincount(minlength=config.vocab_size) / len(places)
    out, into = inverse_root(residuals), inverse_root(inputs * shares.sqrt()[:, None])
    values = block.attn.v_proj.weight.view(config.n_kv_head, -1, config.n_embd)
    outputs = block.attn.o_proj.weight.view(config.n_embd, config.n_head, -1)
    n_shared = config.n_head // config.n_kv_head
    for index, distance in enumerate(DISTANCES[: config.n_head]):
        if index % n_shared or distance >= (config.window_of(0) or config.block_size):
            continue
        by_token = torch.zeros_like(head).index_add_(0, at(-distance), residuals) / math.sqrt(len(places))
        left, scales, right = torch.linalg.svd(out @ (by_token.T @ inputs).double() @ into)
        rank = min(config.head_dim, config.n_embd)
        value = scales[:rank, None].sqrt() * right[:rank] @ into
        size = INIT_STD * math.sqrt(value.numel()) / value.norm().clamp(min=1e-12)  # as large as it was
        values[index // n_shared, :rank] = value * size
        outputs[:, index, :rank] = out @ left[:, :rank] * scales[:rank].sqrt() / size * RMS * STEP


def inverse_root(rows: Tensor) -> Tensor:
    """The inverse root of the sum of x xᵀ, of rows x.  (N, C) -> (C, C) float64"""
    variances, directions = torch.linalg.eigh((rows.T @ rows).double())
    return directions * (variances.clamp(min=0) + RIDGE * variances.mean() + 1e-12).rsqrt() @ directions.T
