"""Proposals change only the speed: the same text without sampling, the same distribution with it."""

import dataclasses
import functools
import random

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.generate import Answer, Sampling, Search, Speculation, generate, generate_batch, stream
from tinygpt.generate.sampling import Past
from tinygpt.generate.speculative import LookUp, accept, distributions, speculate
from tinygpt.params import ParamsError

MODEL, DRAFT = tiny_model(block_size=32), tiny_model(block_size=32, n_layer=1, seed=5)
SHORT_DRAFT = tiny_model(block_size=6, n_layer=1, seed=5)
GREEDY = Sampling(temperature=0)
PROMPTS = ["", "the file the file the", "über 中文 😀 and more than the context holds, " * 3]
SPECULATIONS = {
    "look-up": Speculation(),
    "look-up of one": Speculation(n_draft=1, ngram=1),
    "look-up of many": Speculation(n_draft=40),
    "draft": Speculation(draft=DRAFT),
    "itself": Speculation(draft=MODEL, n_draft=3),
    "draft of a short context": Speculation(draft=SHORT_DRAFT, n_draft=5),
    "more than the draft's context": Speculation(draft=SHORT_DRAFT, n_draft=40),
}
CERTAIN = {
    "greedy": GREEDY,
    "penalties": Sampling(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2),
    "no n-gram twice": Sampling(temperature=0, no_repeat_ngram_size=2, logit_bias=((17, 4.0),), banned_ids=(5,)),
    "stop": Sampling(temperature=0, stop=("e", "th"), stop_ids=tuple(range(1, 300, 30))),
    "at least": Sampling(temperature=0, min_new_tokens=40, stop_ids=tuple(range(0, 300, 2))),
    "to the end of the context": Sampling(temperature=0, when_full="stop", ignore_eos=True),
}


def whole(model, prompt, tokenizer, sampling, speculation=None, n=56):
    if sampling.when_full == "stop":
        prompt = prompt[:20]
    (answer,) = generate_batch(
        model, tokenizer, [prompt], max_new_tokens=n, sampling=sampling, speculation=speculation, n_logprobs=2
    )
    return answer


whole_once = functools.cache(whole)  # the reference without proposals


ALL_SAMPLINGS = ("look-up", "more than the draft's context")  # the others differ in what they propose


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in SPECULATIONS for name in (CERTAIN if kind in ALL_SAMPLINGS else ("greedy", "stop"))],
)
def test_the_likeliest_text_is_the_same_to_its_end_and_past_the_end_of_the_context(kind, name, tiny_tokenizer):
    speculation, sampling = SPECULATIONS[kind], CERTAIN[name]
    for prompt in PROMPTS:
        plain = whole_once(MODEL, prompt, tiny_tokenizer, sampling)
        found = whole(MODEL, prompt, tiny_tokenizer, sampling, speculation)
        assert (found.ids, found.text, found.finish_reason) == (plain.ids, plain.text, plain.finish_reason)
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
        assert len(found.top_logprobs) == len(plain.top_logprobs)


PENALTIES = {"frequency_penalty": -0.5, "repetition_penalty": 0.8, "no_repeat_ngram_size": 4}


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), n_draft=st.integers(1, 8), ngram=st.integers(1, 4), data=st.data())
def test_with_looked_up_proposals_a_seed_gives_the_same_text_as_without(seed, n_draft, ngram, data, tiny_tokenizer):
    options = data.draw(st.sampled_from([{"temperature": 0.3}, {"top_p": 0.9}, PENALTIES]))
    sampling, prompt = Sampling(seed=seed, **options), data.draw(st.sampled_from(PROMPTS))
    speculation = Speculation(n_draft=n_draft, ngram=ngram)
    assert (
        whole(MODEL, prompt, tiny_tokenizer, sampling, speculation).ids
        == whole(MODEL, prompt, tiny_tokenizer, sampling).ids
    )


@pytest.mark.parametrize("changes", [*FAMILIES.values(), {"window": 5}, {"window": 5, "full_every": 2, "n_kv_head": 1}])
def test_every_family_and_windows(changes, tiny_tokenizer):
    model, draft = (tiny_model(block_size=48, seed=seed, **changes) for seed in (0, 5))
    plain = whole(model, PROMPTS[1], tiny_tokenizer, GREEDY)
    for speculation in (Speculation(n_draft=6), Speculation(draft=draft)):
        assert whole(model, PROMPTS[1], tiny_tokenizer, GREEDY, speculation).ids == plain.ids


def test_the_model_as_its_own_draft_gives_n_draft_plus_one_tokens_a_pass(tiny_tokenizer):
    sampling, speculation = Sampling(temperature=0, ignore_eos=True), Speculation(draft=MODEL, n_draft=4)
    answer = whole(MODEL, "the", tiny_tokenizer, sampling, speculation, n=1 + 5 * 4)
    assert len(answer.ids) == 21
    assert answer.n_pass == 5  # reading the prompt gives one token


def test_proposals_are_looked_up_in_a_text_that_repeats_itself(tiny_tokenizer):
    look_up = LookUp(3)
    answer = Answer([1, 2, 3, 4, 9, 2, 3], tiny_tokenizer, GREEDY, max_new_tokens=9, block_size=32)
    assert look_up(answer, 3).ids == [4, 9, 2]
    answer.add(4)
    assert look_up(answer, 6).ids == [9, 2, 3, 4, 9, 2]  # continues from its own proposals
    answer.add(3)  # 4 followed it the last time
    assert look_up(answer, 1).ids == [4]
    answer.add(250)
    assert look_up(answer, 5).ids == []


# The distribution of the first ids with a vocabulary of V: exact probabilities of all texts, and many draws.

V, N_FIRST, N_DRAW = 4, 3, 700  # the second and the third id come from the first proposal
TINY = {"vocab_size": V, "block_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 1}
SMALL_TARGET, SMALL_DRAFT = tiny_model(**TINY), tiny_model(**TINY, seed=3)
DRAWN = {
    "all": {},
    "filters": {"temperature": 1.7, "top_k": 3, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "no_repeat_ngram_size": 2, "temperature": 1.5},
}


class SmallTokenizer:
    """The parts of a tokenizer that an answer needs."""

    vocab_size, eos_id = V, 0

    def decode_bytes(self, ids):
        return bytes(65 + i for i in ids)


def small_answer(sampling, n):
    return Answer([3, 1], SmallTokenizer(), sampling, max_new_tokens=n, block_size=8)


def exact(sampling, ids=()):
    """Probabilities of all texts, by their first N_FIRST ids, or fewer if a text ends early."""
    if len(ids) == N_FIRST or ids[-1:] == (0,):
        return {ids: 1.0}
    with torch.inference_mode():
        logits = SMALL_TARGET(torch.tensor([[3, 1, *ids]]))[:, -1]
    (probabilities,) = distributions(logits, sampling, Past([[3, 1]], [list(ids)], 0)).tolist()
    return {
        text: first * p
        for i, first in enumerate(probabilities)
        if first > 0
        for text, p in exact(sampling, (*ids, i)).items()
    }


def first_ids(seed, options):
    answer = small_answer(Sampling(**options, seed=seed), N_FIRST + 2)
    for _ in speculate(SMALL_TARGET, answer, Speculation(draft=SMALL_DRAFT, n_draft=2)):
        if len(answer.ids) == N_FIRST:
            return tuple(answer.ids), answer.n_pass
    return (*answer.ids, 0), answer.n_pass


def chi_square(counts, expected, n):
    """Sum of (found - expected)² / expected over cells of at least 5 expected draws, and the number of cells."""
    large = {text: n * p for text, p in expected.items() if n * p >= 5}
    rest = (n - sum(counts.get(text, 0) for text in large), n - sum(large.values()))
    cells = [(counts.get(text, 0), mean) for text, mean in large.items()] + ([rest] if rest[1] >= 5 else [])
    return sum((found - mean) ** 2 / mean for found, mean in cells), len(cells)


@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
def test_draws_have_the_distribution_of_the_model(options):
    expected, counts, n_taken = exact(Sampling(**options)), dict[tuple[int, ...], int](), 0
    for seed in range(N_DRAW):
        text, n_pass = first_ids(seed, options)
        assert text in expected
        counts[text] = counts.get(text, 0) + 1
        n_taken += len(text) - n_pass
    found, n_cell = chi_square(counts, expected, N_DRAW)
    assert n_cell > 10
    assert found < n_cell + 4 * (2 * n_cell) ** 0.5  # mean and four standard deviations of chi-square
    assert N_DRAW / 10 < n_taken < N_DRAW  # some proposals were taken, some not


@pytest.mark.parametrize(
    ("wanted", "drawn_from"),
    [
        ([0.5, 0.3, 0.2], [0.1, 0.2, 0.7]),
        ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]),
        ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]),
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([0.2, 0.3, 0.5], [0.0, 1.0, 0.0]),
    ],
)
def test_one_proposed_id_and_the_one_after_it_follow_the_rule(wanted, drawn_from):
    p, q, after = (torch.tensor(each, dtype=torch.float64) for each in (wanted, drawn_from, [0.1, 0.2, 0.7]))
    generator, n, first, second = random.Random(1), 1500, [0, 0, 0], [0, 0, 0]
    for _ in range(n):
        (proposed,) = generator.choices(range(3), drawn_from)
        ids = accept([proposed], q[None], torch.stack((p, after)), generator)
        first[ids[0]] += 1
        if len(ids) == 2:
            second[ids[1]] += 1
    assert [found / n for found in first] == pytest.approx(wanted, abs=0.05)
    taken = sum(second)
    assert taken / n == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.05)  # no rule could accept more
    assert not taken or [found / taken for found in second] == pytest.approx(after.tolist(), abs=0.07)


def test_a_text_ends_where_no_token_may_follow():
    none = Sampling(banned_ids=tuple(range(V)))
    for draft in (SMALL_DRAFT, None):
        for sampling in (none, dataclasses.replace(none, temperature=0), Sampling(no_repeat_ngram_size=1)):
            answer = small_answer(sampling, n=50)
            for _ in speculate(SMALL_TARGET, answer, Speculation(draft=draft)):
                pass
            assert answer.finish_reason == "stop"
            assert len(set(answer.ids)) == len(answer.ids) <= V - 2


def test_pieces_come_token_by_token_and_a_seed_decides_them(tiny_tokenizer):
    sampling, speculation = Sampling(seed=4), Speculation(draft=DRAFT)
    options = {"max_new_tokens": 30, "sampling": sampling, "speculation": speculation}
    pieces = list(stream(MODEL, tiny_tokenizer, "the", **options))
    assert "".join(pieces) == generate(MODEL, tiny_tokenizer, "the", **options)
    assert len(pieces) > 10
    several = generate_batch(MODEL, tiny_tokenizer, ["a", "the"], **options)
    assert several[1].text == "".join(pieces)


@pytest.mark.parametrize(
    ("speculation", "search", "message"),
    [
        ({"draft": tiny_model(vocab_size=301)}, Search(), "draft has 301 tokens, the model 300"),
        ({}, Search(n_beam=2), "proposals do not work with n_beam or best_of"),
        ({}, Search(best_of=2), "proposals do not work with n_beam or best_of"),
        ({"n_draft": 0}, Search(), r"n_draft=0 must be from 1 to 64"),
        ({"ngram": 0}, Search(), r"ngram=0 must be from 1 to 16"),
    ],
)
def test_what_does_not_fit_is_reported_by_name(speculation, search, message, tiny_tokenizer):
    sampling = GREEDY if search.n_beam > 1 else Sampling()
    for function, prompt in ((generate, "a"), (stream, "a"), (generate_batch, ["a"])):
        with pytest.raises(ParamsError, match=message):
            function(
                MODEL,
                tiny_tokenizer,
                prompt,
                max_new_tokens=5,
                sampling=sampling,
                search=search,
                speculation=Speculation(**speculation),
            )
