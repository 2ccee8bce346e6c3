"""Functions of logits on examples and against transformers, and how tokens are drawn."""

import dataclasses
import math
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from conftest import FAMILIES, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tinygpt.errors import UserError
from tinygpt.export.hf import export_hf
from tinygpt.generate import Sampling, Search, Speculation, generate_batch
from tinygpt.generate.sampling import (
    FILTERS,
    PENALTIES,
    Past,
    apply_filters,
    apply_penalties,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
)
from tinygpt.params import ParamsError

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
EOS = 0
V = 12

# Option -> values to try, and the same in transformers, from a value, the prompt's length and the ids that end a text.
ids_of_v = st.lists(st.integers(0, V - 2), min_size=1, max_size=4, unique=True).map(tuple)
OPTIONS = {
    "logit_bias": (
        st.dictionaries(st.integers(0, V - 1), st.floats(-9, 9), min_size=1).map(lambda bias: tuple(bias.items())),
        lambda bias, n, ends: transformers.SequenceBiasLogitsProcessor({(i,): b for i, b in bias}),
    ),
    "repetition_penalty": (
        st.floats(0.2, 3),
        lambda penalty, n, ends: transformers.RepetitionPenaltyLogitsProcessor(penalty),
    ),
    "frequency_penalty": (st.floats(-2, 2), lambda penalty, n, ends: Penalty(penalty, n, lambda count: count)),
    "presence_penalty": (st.floats(-2, 2), lambda penalty, n, ends: Penalty(penalty, n, lambda count: count > 0)),
    "no_repeat_ngram_size": (st.integers(1, 4), lambda size, n, ends: transformers.NoRepeatNGramLogitsProcessor(size)),
    "min_new_tokens": (
        st.integers(1, 6),
        lambda least, n, ends: transformers.MinNewTokensLengthLogitsProcessor(n, least, ends),
    ),
    "banned_ids": (ids_of_v, lambda ids, n, ends: transformers.generation.SuppressTokensLogitsProcessor(ids)),
    "ignore_eos": (st.just(True), lambda on, n, ends: transformers.generation.SuppressTokensLogitsProcessor([EOS])),
    "temperature": (st.floats(0.1, 5), lambda temperature, n, ends: transformers.TemperatureLogitsWarper(temperature)),
    "top_k": (st.integers(1, 20), lambda k, n, ends: transformers.TopKLogitsWarper(k)),
    "top_p": (st.floats(0.01, 0.99), lambda p, n, ends: transformers.TopPLogitsWarper(p)),
    "min_p": (st.floats(0.01, 1), lambda share, n, ends: transformers.MinPLogitsWarper(share)),
    "typical_p": (st.floats(0.01, 0.99), lambda p, n, ends: transformers.TypicalLogitsWarper(p)),
}


class Penalty:
    """Frequency and presence penalties by OpenAI's formula, as transformers does not have them."""

    def __init__(self, penalty, n_prompt, of_count):
        self.penalty, self.n_prompt, self.of_count = penalty, n_prompt, of_count

    def __call__(self, ids, logits):
        return torch.tensor(
            [
                [value - self.penalty * self.of_count(row[self.n_prompt :].count(i)) for i, value in enumerate(values)]
                for row, values in zip(ids.tolist(), logits.tolist(), strict=True)
            ],
            dtype=logits.dtype,
        )


def test_every_option_has_a_function_and_a_row_here():
    elsewhere = {"stop", "stop_ids", "when_full", "seed"}  # tests/test_generate.py has them
    assert set(OPTIONS) == PENALTIES.keys() | FILTERS.keys()
    assert set(OPTIONS) | elsewhere == {field.name for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp(Sampling):
    """Two made-up options: only their fields here and their functions exist."""

    forbid_odd: bool = False
    keep_lowest: int = 0


def forbid_odd(logits, on, past):
    return logits.masked_fill(torch.arange(logits.size(-1)) % 2 == 1, -math.inf)


def keep_lowest(logits, n):
    return logits.masked_fill(torch.arange(logits.size(-1)) >= n, -math.inf)


@pytest.mark.parametrize("speculation", [None, Speculation(), Speculation(draft=tiny_model(n_layer=1, seed=3))])
def test_a_made_up_penalty_and_a_made_up_filter_need_no_more_than_a_field_and_a_function(
    speculation, monkeypatch, tiny_tokenizer
):
    monkeypatch.setitem(PENALTIES, "forbid_odd", forbid_odd)
    monkeypatch.setitem(FILTERS, "keep_lowest", keep_lowest)

    def ids(**options):
        sampling = MadeUp(ignore_eos=True, **options)
        (answer,) = generate_batch(
            tiny_model(), tiny_tokenizer, ["the"], max_new_tokens=20, sampling=sampling, speculation=speculation
        )
        return answer.ids

    assert any(i % 2 for i in ids()) and max(ids()) > 40
    assert not any(i % 2 for i in ids(forbid_odd=True)) and max(ids(forbid_odd=True)) > 40
    assert not any(i % 2 for i in ids(forbid_odd=True, temperature=0))
    assert max(ids(keep_lowest=40)) < 40 < max(ids(keep_lowest=40, temperature=0))  # at 0 nothing is drawn


def assert_same_distribution(ours, theirs):
    assert torch.equal(ours > -math.inf, theirs > -math.inf)
    # transformers keeps biases in float32, whose step at 16 is 2e-6
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@given(data=st.data())
def test_each_option_does_to_logits_what_transformers_does(option, data):
    values, processor = OPTIONS[option]
    value = data.draw(values)
    seed, n_prompt, n_new = data.draw(st.tuples(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 8)))
    logits = torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    ids = random_ids(3, n_prompt + n_new, vocab_size=V, seed=seed)
    past = Past(ids[:, :n_prompt].tolist(), ids[:, n_prompt:].tolist(), EOS, stop_ids=(3,))
    before = logits.clone()
    sampling = Sampling(**{option: value})
    ours = apply_filters(apply_penalties(logits, sampling, past), sampling)
    assert torch.equal(logits, before)
    assert_same_distribution(ours, processor(value, n_prompt, [EOS, 3])(ids, logits))


TOGETHER = [
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.6, "min_p": 0.05, "typical_p": 0.8, "repetition_penalty": 1.3},
    {"top_p": 0.95, "typical_p": 0.9, "no_repeat_ngram_size": 1, "temperature": 3.0},
    {"logit_bias": ((7, 3.0), (9, -2.0)), "banned_ids": (5, 6), "repetition_penalty": 0.8, "min_new_tokens": 1},
]


@pytest.mark.parametrize("options", TOGETHER)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_together_leave_the_distribution_of_transformers_generate(family, options, tmp_path, tiny_tokenizer):
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, **FAMILIES[family])
    tiny_tokenizer.save(tmp_path)
    export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    asked = {"top_k": 0} | options
    if bias := asked.pop("logit_bias", None):
        asked["sequence_bias"] = {(i,): value for i, value in bias}
    if banned := asked.pop("banned_ids", None):
        asked["suppress_tokens"] = banned
    ids = random_ids(2, 20)
    found = theirs.generate(
        ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **asked
    )
    sampling = Sampling(**options)
    past = Past(ids.tolist(), [[], []], tiny_tokenizer.eos_id)
    with torch.inference_mode():
        ours = apply_filters(apply_penalties(model(ids)[:, -1].double(), sampling, past), sampling)
    torch.testing.assert_close(ours.softmax(-1), found.scores[0].double().softmax(-1), atol=1e-4, rtol=1e-3)


def kept(logits):
    return [i for i, value in enumerate(logits[0].tolist()) if value > -math.inf]


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_by_hand(k, expected):
    assert kept(keep_top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_by_hand(p, expected):
    assert kept(keep_top_p(LOGITS, p)) == expected
    shuffled = [2, 0, 3, 1]
    assert kept(keep_top_p(LOGITS[:, shuffled], p)) == sorted(shuffled.index(i) for i in expected)


@pytest.mark.parametrize(("share", "expected"), [(0.05, [0, 1, 2, 3]), (0.2, [0, 1, 2]), (0.5, [0, 1]), (1.0, [0])])
def test_min_p_by_hand(share, expected):
    assert kept(keep_min_p(LOGITS, share)) == expected


@given(
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    options=st.fixed_dictionaries(
        {"temperature": st.floats(1e-300, 1e300)},
        optional={
            "top_k": st.integers(0, 40),
            "top_p": st.floats(0.001, 1),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0.001, 1),
        },
    ),
)
def test_a_token_is_always_left_and_except_for_typical_it_is_the_likeliest(values, options):
    logits = torch.tensor([values, values[::-1]], dtype=torch.float64)
    filtered = apply_filters(logits, Sampling(**options))
    assert not filtered.isnan().any()
    assert all(kept(filtered[row : row + 1]) for row in range(2))
    if "typical_p" not in options:
        assert filtered[0].max() == filtered[0, logits[0].argmax()]
    ids = draw(filtered.double().softmax(-1), [0.0, 1 - 2**-48])
    assert all(filtered[row, i] > -math.inf for row, i in enumerate(ids.tolist()))


def test_typical_takes_a_share_that_rounding_keeps_the_sum_of_all_below():
    logits = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).double()
    assert keep_typical(logits, math.nextafter(1, 0)).isfinite().any(-1).all()


def test_a_draw_is_where_the_cumulated_probability_passes_the_number():
    numbers = [0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 2**-48]
    assert draw(LOGITS.double().softmax(-1).expand(8, 4), numbers).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    forbidden = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, 5)
    assert draw(forbidden.double().softmax(-1), [0.0, 0.49, 0.5, 1 - 2**-48]).tolist() == [1, 1, 3, 3]


def drawn(sampling, n, logits=LOGITS, seed=3):
    generator, past = random.Random(seed), Past([[1]], [[]], EOS)
    return [choose(logits, sampling, past, [generator])[0] for _ in range(n)]


def test_draws_follow_the_probabilities():
    counts = torch.bincount(torch.tensor(drawn(Sampling(), 4000)), minlength=4) / 4000
    torch.testing.assert_close(counts.double(), LOGITS.exp()[0], atol=0.03, rtol=0)


def test_temperature_zero_takes_the_likeliest_after_penalties_and_without_filters():
    assert set(drawn(Sampling(temperature=0, typical_p=0.01), 5)) == {0}
    assert set(drawn(Sampling(temperature=0, banned_ids=(0,)), 5)) == {1}
    assert drawn(Sampling(), 20) == drawn(Sampling(), 20) != drawn(Sampling(), 20, seed=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_an_allowed_token_gives_none_and_others_give_theirs(temperature):
    past = Past([[0, 1, 2, 3], [1]], [[], []], EOS)
    sampling = Sampling(no_repeat_ngram_size=1, temperature=temperature, top_p=0.5, typical_p=0.5)
    ids = choose(LOGITS.expand(2, 4), sampling, past, [random.Random(0), random.Random(0)])
    assert ids[0] is None
    assert ids[1] in (0, 2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_reported(bad):
    with pytest.raises(UserError, match="not finite"):
        drawn(Sampling(), 1, torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Sampling, {"temperature": -0.1}, r"temperature=-0.1 must be 0 or more"),
        (Sampling, {"temperature": math.nan}, "temperature=nan must be"),
        (Sampling, {"temperature": math.inf}, "temperature=inf must be"),
        (Sampling, {"top_k": -1}, "top_k=-1 must be"),
        (Sampling, {"top_p": 0.0}, r"top_p=0.0 must be above 0 and at most 1"),
        (Sampling, {"top_p": 2}, r"top_p=2 must be above 0 and at most 1"),
        (Sampling, {"min_p": 1.1}, "min_p=1.1 must be"),
        (Sampling, {"typical_p": 0}, "typical_p=0 must be"),
        (Sampling, {"repetition_penalty": 0}, "repetition_penalty=0 must be"),
        (Sampling, {"frequency_penalty": math.inf}, "frequency_penalty=inf must be"),
        (Sampling, {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be"),
        (Sampling, {"min_new_tokens": -1}, "min_new_tokens=-1 must be"),
        (Sampling, {"logit_bias": ((1, math.nan),)}, "logit_bias.0..1.=nan must be a finite number"),
        (Sampling, {"stop": "ab"}, "stop=ab must be a list"),
        (Sampling, {"logit_bias": {5: 1.0}}, "logit_bias={.5.: 1.0} must be a list"),
        (Sampling, {"stop": ("a", "")}, 'stop="" would end every text at once'),
        (Sampling, {"when_full": "shift"}, "when_full=shift is not one of slide, stop"),
        (Sampling, {"seed": -1}, "seed=-1 must be"),
        (Search, {"n_beam": 0}, r"n_beam=0 must be from 1 to 256"),
        (Search, {"n_beam": 2, "length_penalty": 1e6}, r"length_penalty=1000000.0 must be from -10 to 10"),
        (Search, {"best_of": 0}, r"best_of=0 must be from 1 to 256"),
        (Search, {"n_beam": 2, "best_of": 2}, "n_beam=2 and best_of=2: set one to 1"),
        (Search, {"length_penalty": 2.0}, "length_penalty is for beam search: it needs n_beam above 1"),
        (Search, {"early_stopping": "true"}, "early_stopping is for beam search: it needs n_beam above 1"),
        (Search, {"n_beam": 2, "early_stopping": "yes"}, "early_stopping=yes is not one of"),
    ],
)
def test_bad_values_and_options_that_contradict_each_other_are_reported_by_name(cls, options, message):
    with pytest.raises(ParamsError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("search", "sampling", "message"),
    [
        ({"n_beam": 2}, {}, "n_beam=2 does not sample: it needs temperature=0"),
        ({"n_beam": 2}, {"temperature": 0, "top_k": 5}, "top_k is for sampling: turn it off for beam search"),
        ({"best_of": 3}, {"temperature": 0}, "best_of=3 needs temperature above 0"),
    ],
)
def test_a_search_that_contradicts_the_sampling_is_reported(search, sampling, message):
    with pytest.raises(ParamsError, match=message):
        Search(**search).check(Sampling(**sampling))


@pytest.mark.parametrize("option", [{"logit_bias": ((300, 1.0),)}, {"banned_ids": (-1,)}, {"stop_ids": (4, 300)}])
def test_an_id_that_the_model_does_not_have_is_reported(option):
    (name,) = option
    with pytest.raises(ParamsError, match=f"{name} has (300|-1), but the model's ids are 0 to 299"):
        Sampling(**option).check_ids(300)
