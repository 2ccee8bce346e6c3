"""Before the first step, the model predicts the counted token pairs, and early heads look back."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_config

from tinygpt.model.gpt import GPT, INIT_STD
from tinygpt.model.inside import attention_maps
from tinygpt.train import first_weights
from tinygpt.train.first_weights import PRIOR, set_first_weights, taken_evenly

N_VOCAB = 30


@pytest.fixture
def tokens():
    """A text in which the next token depends on the one before; the last three ids never occur."""
    rng = np.random.default_rng(3)
    chances = rng.dirichlet(np.full(N_VOCAB - 3, 0.3), size=N_VOCAB - 3)
    ids = [0]
    for _ in range(3000):
        ids.append(rng.choice(N_VOCAB - 3, p=chances[ids[-1]]))
    return np.array(ids, dtype="<u2")


def begun(tokens, **config):
    fields = {"vocab_size": N_VOCAB, "norm_eps": 1e-12, "tie_weights": False} | config
    model = GPT(tiny_config(**fields), generator=torch.Generator().manual_seed(0))
    set_first_weights(model, tokens)
    return model


def log_probabilities(model):
    with torch.inference_mode():
        return model(torch.arange(N_VOCAB)[:, None])[:, 0].log_softmax(1)


def test_with_enough_columns_they_are_exact_but_for_the_longest(tokens):
    found = log_probabilities(begun(tokens, n_embd=64))
    pairs, times = Counter(pairwise(tokens)), Counter(tokens)
    shares = torch.tensor([(times[b] + 1) / (len(tokens) + N_VOCAB) for b in range(N_VOCAB)])
    factors = []
    for a in range(N_VOCAB):
        counts = torch.tensor([pairs[a, b] for b in range(N_VOCAB)])
        gains = (counts / (PRIOR * shares)).log1p()
        least, most = gains.argmin(), gains.argmax()
        rises = found[a] - shares.log()
        factors.append(((rises[most] - rises[least]) / (gains[most] - gains[least])).item() if a in times else 1.0)
        expected = (shares.log() + factors[-1] * gains).log_softmax(0)
        torch.testing.assert_close(found[a], expected, atol=2e-4, rtol=0)
    assert max(factors) < 1 + 1e-3
    assert 8 < sum(factor > 1 - 1e-3 for factor in factors) < 22
    assert min(factors) > 0.7


def test_with_fewer_columns_they_are_near_and_better_than_shares_alone(tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))

    def loss(log_p):
        return -log_p[ids[:-1], ids[1:]].mean().item()

    alone = (ids.bincount(minlength=N_VOCAB) / len(ids)).clamp(min=1e-9).log().expand(N_VOCAB, -1)
    exact, near, far = (loss(log_probabilities(begun(tokens, n_embd=width))) for width in (64, 24, 8))
    assert exact < near < far < loss(alone)
    assert near - exact < 0.2 * (loss(alone) - exact)


@pytest.mark.parametrize("n_embd", [8, 64])
def test_all_embeddings_have_the_length_that_was_the_best_in_training(tokens, n_embd):
    weights = begun(tokens, n_embd=n_embd).tok_emb.weight
    torch.testing.assert_close(weights.square().mean(1).sqrt(), torch.full((N_VOCAB,), 0.2))


def test_layernorm_and_learned_positions_change_little(tokens):
    exact = log_probabilities(begun(tokens, n_embd=64)).exp()
    other = log_probabilities(begun(tokens, n_embd=64, norm="layernorm", position="learned")).exp()
    assert (exact - other).abs().sum(1).mean() < 0.2  # it could be up to 2


def test_tied_embeddings_stay_random(tokens):
    weights = begun(tokens, tie_weights=True).tok_emb.weight
    assert weights.std().item() == pytest.approx(INIT_STD, rel=0.1)


def test_the_same_bits_each_time_and_no_random_number_of_others_is_used(tokens):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = begun(tokens).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, first[name]) for name, tensor in begun(tokens).state_dict().items())


def test_a_long_text_is_counted_in_pieces_from_all_of_it(tokens, monkeypatch):
    monkeypatch.setattr(first_weights, "MAX_TOKENS", 1000)
    monkeypatch.setattr(first_weights, "N_PIECES", 10)
    taken = taken_evenly(tokens)
    assert len(taken) == 1000
    assert np.array_equal(taken[:100], tokens[:100]) and np.array_equal(taken[-100:], tokens[-100:])
    assert np.isfinite(log_probabilities(begun(tokens)).numpy()).all()


@pytest.mark.parametrize("ids", [[0, 0, 0], [1, 2], [7] * 500])
def test_a_text_of_few_pairs_gives_numbers(ids):
    assert log_probabilities(begun(np.array(ids, dtype="<u2"))).isfinite().all()


def looking_back(model, tokens):
    """The heads of each block that look one to four places back."""
    maps = attention_maps(model, tokens[:40].tolist())
    return [
        [
            distance
            for distance, head in enumerate(layer[:4], 1)
            if (head[distance:].argmax(1) == np.arange(40 - distance)).all() and head[distance:].max(1).mean() > 0.4
        ]
        for layer in maps
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"qk_norm": True},
        {"qk_norm": True, "n_kv_head": 2, "window": 8},
        {"qk_norm": True, "n_embd": 128, "n_head": 8, "parallel_block": True},
        {"qk_norm": True, "norm": "layernorm"},
        {"qk_norm": False, "norm": "layernorm"},
        {"qk_norm": False, "head_dim": 16, "n_head": 3, "n_kv_head": 1},
    ],
)
@pytest.mark.parametrize(("n_layer", "n_block"), [(1, 0), (2, 1), (3, 1), (4, 2), (6, 2)])
def test_the_first_heads_of_half_of_the_blocks_look_back(tokens, config, n_layer, n_block):
    fields = {"n_embd": 64, "n_head": 4, "n_layer": n_layer} | config
    found = looking_back(begun(tokens, **fields), tokens)
    assert found[:n_block] == [list(range(1, min(4, fields["n_head"]) + 1))] * n_block
    assert all(len(one) < 3 for one in found[n_block:])


def test_narrow_heads_stay_random(tokens):
    assert all(len(one) < 3 for one in looking_back(begun(tokens, n_embd=32, n_head=4, n_layer=4), tokens))


@pytest.mark.parametrize("n_embd", [1, 2, 3, 4])
def test_a_model_may_be_as_narrow_as_it_likes(tokens, n_embd):
    model = begun(tokens, n_embd=n_embd, n_head=1, head_dim=2)
    assert log_probabilities(model).isfinite().all()


def test_learned_positions_leave_heads_random(tokens):
    config = {"vocab_size": N_VOCAB, "tie_weights": False, "position": "learned", "n_embd": 64}  # wide enough heads
    expected = GPT(tiny_config(**config), generator=torch.Generator().manual_seed(0)).blocks[0].attn.q_proj.weight
    assert torch.equal(begun(tokens, position="learned", n_embd=64).blocks[0].attn.q_proj.weight, expected)
