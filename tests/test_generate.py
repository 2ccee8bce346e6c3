"""Sampling by hand, and streams that never print half a character."""

import math

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.generate import generate, stream
from tinygpt.generate.sampling import Sampling, apply_top_k, apply_top_p, make_filters, make_sampler
from tinygpt.generate.stream import iter_ids

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return [i for i, value in enumerate(logits.tolist()) if value > -math.inf]


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_by_hand(k, expected):
    assert kept(apply_top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p, expected):
    assert kept(apply_top_p(LOGITS.double(), p)) == expected
    shuffled = [2, 0, 3, 1]
    assert kept(apply_top_p(LOGITS.double()[shuffled], p)) == sorted(shuffled.index(i) for i in expected)


@given(
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    k=st.integers(0, 40),
    p=st.floats(0.001, 1),
    temperature=st.floats(0, 5),
)
def test_something_is_always_left_and_the_likeliest_is_among_it(values, k, p, temperature):
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, seed=1)
    logits = torch.tensor(values, dtype=torch.float64)
    filtered = logits
    for apply in make_filters(sampling):
        filtered = apply(filtered)
    assert len(kept(filtered)) >= 1
    assert filtered.max() == filtered[logits.argmax()]
    assert 0 <= make_sampler(sampling)(logits) < len(values)


def test_off_means_no_filter():
    assert make_filters(Sampling(temperature=0, top_k=0, top_p=1.0)) == []


def test_draws_follow_the_probabilities():
    sample = make_sampler(Sampling(seed=3))
    counts = torch.bincount(torch.tensor([sample(LOGITS) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, LOGITS.exp(), atol=0.03, rtol=0)


def test_temperature_zero_takes_the_likeliest_and_a_seed_repeats_itself():
    assert make_sampler(Sampling(temperature=0))(LOGITS) == 0
    draws = [[make_sampler(Sampling(seed=seed))(LOGITS) for _ in range(1)] for seed in range(20)]
    assert draws == [[make_sampler(Sampling(seed=seed))(LOGITS) for _ in range(1)] for seed in range(20)]
    assert len({draw[0] for draw in draws}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_what_the_model_says_without_a_cache(family):
    model = tiny_model(**FAMILIES[family])
    prompt = [5, 7, 11]
    greedy = make_sampler(Sampling(temperature=0))
    ids = iter_ids(model, prompt, greedy)
    seen = list(prompt)
    for _ in range(model.config.block_size - len(prompt) + 1):  # as long as the context reaches back to the start
        with torch.inference_mode():
            expected = int(model(torch.tensor([seen]))[0, -1].argmax())
        assert next(ids) == expected
        seen.append(expected)


def test_generation_goes_on_behind_the_end_of_the_context_with_its_newer_half():
    model = tiny_model(block_size=16)
    ids = iter_ids(model, [1, 2, 3], make_sampler(Sampling(temperature=0)))
    seen = [1, 2, 3, *(next(ids) for _ in range(14))]  # the context of 16 is full, and one token is beyond it
    with torch.inference_mode():
        expected = int(model(torch.tensor([seen[-9:]]))[0, -1].argmax())
    assert next(ids) == expected
    for _ in range(50):
        assert 0 <= next(ids) < 300


def test_a_prompt_longer_than_the_context_is_read_from_its_end():
    model = tiny_model(block_size=16)
    greedy = make_sampler(Sampling(temperature=0))
    long = [i % 300 for i in range(40)]
    assert next(iter_ids(model, long, greedy)) == next(iter_ids(model, long[-16:], greedy))


def test_pieces_make_up_the_text_and_never_half_a_character(tiny_tokenizer):
    model = tiny_model(seed=3)
    sampling = Sampling(seed=1, temperature=1.5)
    pieces = list(stream(model, tiny_tokenizer, "the 😀", max_new_tokens=200, sampling=sampling))
    text = generate(model, tiny_tokenizer, "the 😀", max_new_tokens=200, sampling=sampling)
    assert "".join(pieces) == text
    assert all(pieces)


def test_generation_ends_at_the_end_of_text_and_after_max_new_tokens(tiny_tokenizer):
    model = tiny_model(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: the likeliest is id 0, <|endoftext|>
    assert generate(model, tiny_tokenizer, "a", max_new_tokens=50, sampling=Sampling(temperature=0)) == ""
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer.encode("a")[0]] = model.hidden(torch.tensor([[0]]))[0, 0]
    pieces = list(stream(model, tiny_tokenizer, "", max_new_tokens=3, sampling=Sampling(temperature=0)))
    assert len(pieces) <= 3
