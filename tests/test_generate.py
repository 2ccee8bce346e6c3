"""Texts from prompts: they are the same alone and in a batch, and end where they should."""

import dataclasses

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import UserError
from tinygpt.generate import Answer, Sampling, Search, generate, generate_batch, stream
from tinygpt.generate.stream import extend
from tinygpt.params import ParamsError

GREEDY = Sampling(temperature=0)
MODEL = tiny_model(block_size=32)
PROMPTS = ["", "the file", "über 中文 😀 and more than the context holds, " * 3, "a"]
MIXED = [
    GREEDY,
    Sampling(seed=5, top_k=20, stop_ids=tuple(range(1, 300, 30))),
    Sampling(seed=6, temperature=1.5, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2),
    Sampling(seed=5, top_k=20, stop=("e", "th"), no_repeat_ngram_size=2),
]


def ids_of(model, prompt: list[int], tokenizer, n: int, sampling: Sampling = GREEDY) -> list[int]:
    """The ids that the model adds to a prompt."""
    answer = Answer(prompt, tokenizer, sampling, max_new_tokens=n, block_size=model.config.block_size)
    for _ in extend(model, [answer]):
        pass
    return answer.ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_what_the_model_says_without_a_cache(family, tiny_tokenizer):
    model = tiny_model(**FAMILIES[family])
    prompt = [5, 7, 11]
    n = model.config.block_size - len(prompt) + 1  # while the context still holds the start
    found = ids_of(model, prompt, tiny_tokenizer, n, Sampling(temperature=0, ignore_eos=True))
    seen = list(prompt)
    for _ in range(n):
        with torch.inference_mode():
            logits = model(torch.tensor([seen]))[0, -1]
            logits[tiny_tokenizer.eos_id] = -torch.inf
        seen.append(int(logits.argmax()))
    assert prompt + found == seen


def test_generation_continues_past_the_end_of_the_context_with_its_newer_half(tiny_tokenizer):
    model = tiny_model(block_size=16)
    sampling = Sampling(temperature=0, ignore_eos=True)
    seen = [1, 2, 3, *ids_of(model, [1, 2, 3], tiny_tokenizer, 65, sampling)]
    assert len(seen) == 68
    with torch.inference_mode():  # the context of 16 has slid: 8 ids and one more are left
        logits = model(torch.tensor([seen[8:17]]))[0, -1]
        logits[tiny_tokenizer.eos_id] = -torch.inf
    assert seen[17] == int(logits.argmax())


def test_a_prompt_longer_than_the_context_is_read_from_its_end(tiny_tokenizer):
    model = tiny_model(block_size=16)
    long = [i % 300 for i in range(40)]
    assert ids_of(model, long, tiny_tokenizer, 5) == ids_of(model, long[-16:], tiny_tokenizer, 5)


def test_a_full_context_ends_the_text_with_when_full_stop(tiny_tokenizer):
    model = tiny_model(block_size=16)
    sampling = Sampling(temperature=0, ignore_eos=True, when_full="stop")
    assert len(ids_of(model, [1, 2, 3], tiny_tokenizer, 100, sampling)) == 13
    assert len(ids_of(model, [1] * 15, tiny_tokenizer, 100, sampling)) == 1
    with pytest.raises(ParamsError, match="prompt of 16 tokens leaves no room in a context of 16"):
        ids_of(model, [1] * 16, tiny_tokenizer, 100, sampling)


@pytest.mark.parametrize("sampling", [*MIXED, MIXED], ids=["greedy", "top_k", "penalties", "stop", "each its own"])
def test_a_batch_gives_what_each_prompt_gives_alone(sampling, tiny_tokenizer):
    found = generate_batch(MODEL, tiny_tokenizer, PROMPTS, max_new_tokens=60, sampling=sampling)
    each = sampling if isinstance(sampling, list) else [sampling] * len(PROMPTS)
    for answer, prompt, one in zip(found, PROMPTS, each, strict=True):
        (alone,) = generate_batch(MODEL, tiny_tokenizer, [prompt], max_new_tokens=60, sampling=one)
        assert (answer.ids, answer.text, answer.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
        assert answer.text == generate(MODEL, tiny_tokenizer, prompt, max_new_tokens=60, sampling=one)
    has_stop = isinstance(sampling, list) or sampling.stop or sampling.stop_ids
    assert not has_stop or len({len(answer.ids) for answer in found}) > 1  # some rows continue without others


@settings(max_examples=15)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.sampled_from(MIXED), st.integers(0, 3)), min_size=1, max_size=5
    )
)
def test_a_seed_gives_the_same_text_whatever_runs_next_to_it(rows, tiny_tokenizer):
    each = [dataclasses.replace(sampling, seed=seed) for _, sampling, seed in rows]
    prompts = [prompt for prompt, _, _ in rows]
    found = generate_batch(MODEL, tiny_tokenizer, prompts, max_new_tokens=12, sampling=each)
    for answer, prompt, one in zip(found, prompts, each, strict=True):
        assert answer.text == generate(MODEL, tiny_tokenizer, prompt, max_new_tokens=12, sampling=one)


def test_options_of_sampling_and_misspelled_ones_are_refused(tiny_tokenizer):
    for name in ("temperature", "n_logprob"):
        with pytest.raises(TypeError, match=name):
            generate_batch(MODEL, tiny_tokenizer, ["a"], max_new_tokens=3, **{name: 1})


def test_no_prompts_give_no_answers(tiny_tokenizer):
    assert generate_batch(MODEL, tiny_tokenizer, [], max_new_tokens=9) == []


def test_options_for_each_prompt_are_as_many_as_the_prompts(tiny_tokenizer):
    with pytest.raises(ParamsError, match="1 samplings were given for 2 prompts"):
        generate_batch(tiny_model(), tiny_tokenizer, ["a", "b"], max_new_tokens=2, sampling=[Sampling()])


def test_beams_of_a_batch_are_those_of_each_prompt(tiny_tokenizer):
    search = Search(n_beam=3)
    found = generate_batch(MODEL, tiny_tokenizer, PROMPTS, max_new_tokens=9, sampling=GREEDY, search=search)
    for answer, prompt in zip(found, PROMPTS, strict=True):
        text = generate(MODEL, tiny_tokenizer, prompt, max_new_tokens=9, sampling=GREEDY, search=search)
        assert answer.text == text != ""


def test_pieces_make_up_the_text_and_never_half_a_character(tiny_tokenizer):
    model = tiny_model(seed=3)
    sampling = Sampling(seed=1, temperature=1.5)
    pieces = list(stream(model, tiny_tokenizer, "the 😀", max_new_tokens=200, sampling=sampling))
    text = generate(model, tiny_tokenizer, "the 😀", max_new_tokens=200, sampling=sampling)
    assert "".join(pieces) == text
    assert all(pieces)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_stop_text_never_leaks_and_leaves_what_is_before_it(seed, data, tiny_tokenizer):
    sampling = Sampling(seed=seed, ignore_eos=True)
    whole = generate(MODEL, tiny_tokenizer, "the", max_new_tokens=30, sampling=sampling)
    begin_at = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[begin_at : begin_at + data.draw(st.integers(1, 6))]
    stopped = dataclasses.replace(sampling, stop=(stop, "never in it"))
    pieces = list(stream(MODEL, tiny_tokenizer, "the", max_new_tokens=30, sampling=stopped))
    assert "".join(pieces) == whole[: whole.index(stop)]


def test_stop_ids_end_a_text_and_are_left_out(tiny_tokenizer):
    prompt = [5, 7, 11]
    whole = ids_of(MODEL, prompt, tiny_tokenizer, 20, Sampling(seed=1, ignore_eos=True))
    stopped = ids_of(MODEL, prompt, tiny_tokenizer, 20, Sampling(seed=1, ignore_eos=True, stop_ids=(whole[7], 299)))
    assert stopped == whole[: whole.index(whole[7])]


def test_generation_ends_at_the_end_of_text_and_after_max_new_tokens(tiny_tokenizer):
    model = tiny_model(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits are equal: the first one wins, id 0, <|endoftext|>
    assert generate(model, tiny_tokenizer, "a", max_new_tokens=50, sampling=GREEDY) == ""
    assert ids_of(model, [1], tiny_tokenizer, 50, Sampling(temperature=0, min_new_tokens=7)) == [1] * 7
    assert ids_of(model, [1], tiny_tokenizer, 50, Sampling(temperature=0, ignore_eos=True)) == [1] * 50
    assert ids_of(model, [1], tiny_tokenizer, 50, Sampling(temperature=0, banned_ids=tuple(range(300)))) == []
    sampling = Sampling(temperature=0, ignore_eos=True)
    answer = Answer("", tiny_tokenizer, sampling, max_new_tokens=3, block_size=model.config.block_size)
    reasons = [answer.finish_reason for _ in extend(model, [answer])]
    assert reasons == [None, None, "length"]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"max_new_tokens": 0}, r"max_new_tokens=0 must be 1 or more"),
        ("a", {"sampling": Sampling(min_new_tokens=9)}, "min_new_tokens=9 is more than max_new_tokens=5"),
        ("a", {"sampling": Sampling(stop_ids=(999,))}, "stop_ids has 999, but the model's ids are 0 to 299"),
        ("a", {"search": Search(n_beam=2)}, "n_beam=2 does not sample"),
        ("ok \udcff", {}, "prompt is not UTF-8 from character 3 on"),
    ],
)
def test_impossible_generations_are_reported(prompt, options, message, tiny_tokenizer):
    with pytest.raises(UserError, match=message):
        generate(MODEL, tiny_tokenizer, prompt, **{"max_new_tokens": 5} | options)
