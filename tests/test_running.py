"""Answers that come and go while others run: each is the same as alone."""

import dataclasses

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.generate import Sampling, Search, generate_batch
from tinygpt.generate.answer import Answer, Running
from tinygpt.generate.stream import extend
from tinygpt.params import ParamsError

MODEL = tiny_model(block_size=32)
PROMPTS = ["", "the file", "über 中文 😀 and more than the context holds, " * 3]
KINDS = [
    Sampling(temperature=0),
    Sampling(top_k=20, stop=("e", "th"), no_repeat_ngram_size=2),
    Sampling(temperature=1.5, repetition_penalty=1.3, presence_penalty=-0.2, stop_ids=tuple(range(1, 300, 30))),
]
NEW = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(KINDS),
    st.integers(0, 3),
    st.integers(1, 9),
    st.sampled_from([None, 0, 3]),
)


def begun(tokenizer, prompt: str, sampling: Sampling, seed: int, n: int, n_logprobs: int | None) -> Answer:
    sampling = dataclasses.replace(sampling, seed=seed)
    return Answer(prompt, tokenizer, sampling, max_new_tokens=n, block_size=32, n_logprobs=n_logprobs)


@settings(max_examples=40)
@given(
    moments=st.lists(st.tuples(st.lists(NEW, max_size=3), st.integers(0, 3)), min_size=1, max_size=8), data=st.data()
)
def test_an_answer_does_not_depend_on_what_comes_and_goes_next_to_it(moments, data, tiny_tokenizer):
    running, all_new, dropped = Running(MODEL), list[tuple[tuple, Answer]](), list[Answer]()
    for new, n_step in moments:
        answers = [begun(tiny_tokenizer, *each) for each in new]
        running.add(answers)
        all_new += zip(new, answers, strict=True)
        for _ in range(n_step):
            before = list(running.answers)
            assert running.step() == before
            assert running.answers == [answer for answer in before if not answer.finish_reason]
        if running.answers and data.draw(st.booleans()):
            dropped.append(data.draw(st.sampled_from(running.answers)))
            running.drop(dropped[-1:])
            running.drop(dropped)  # they no longer run: nothing happens
    while running.answers:
        running.step()
    for asked, answer in all_new:
        alone = begun(tiny_tokenizer, *asked)
        for _ in extend(MODEL, [alone]):
            pass
        if any(answer is one for one in dropped):
            assert alone.ids[: len(answer.ids)] == answer.ids
            assert answer.finish_reason is None
        else:
            assert (answer.ids, answer.text, answer.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
            assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", KINDS)
def test_log_probabilities_are_those_of_the_model(sampling, tiny_tokenizer):
    for n_logprobs in (0, 4, 1000):
        (answer,) = generate_batch(
            MODEL, tiny_tokenizer, ["the file"], max_new_tokens=20, sampling=sampling, n_logprobs=n_logprobs
        )
        with torch.inference_mode():
            whole = MODEL(torch.tensor([answer.prompt + answer.ids])[:, :32])[0].double().log_softmax(-1)
        rows = whole[len(answer.prompt) - 1 :]
        n_ended = len(answer.logprobs) - len(answer.ids)  # 1 if an id ended the answer
        assert n_ended in (0, 1)
        for row, chosen, logprob, best in zip(rows, answer.ids, answer.logprobs, answer.top_logprobs, strict=False):
            assert logprob == pytest.approx(float(row[chosen]), abs=1e-4)
            assert len(best) == min(n_logprobs, 300)
            assert [value for _, value in best] == pytest.approx(row.topk(len(best)).values.tolist(), abs=1e-4)
            assert [value for _, value in best] == pytest.approx([float(row[i]) for i, _ in best], abs=1e-4)


def test_log_probabilities_are_kept_only_on_request(tiny_tokenizer):
    sampling, search = KINDS[2], Search(best_of=2)
    (plain,) = generate_batch(MODEL, tiny_tokenizer, ["a"], max_new_tokens=5, sampling=sampling)
    (best,) = generate_batch(
        MODEL, tiny_tokenizer, ["a"], max_new_tokens=5, sampling=sampling, search=search, n_logprobs=2
    )
    assert (plain.logprobs, plain.top_logprobs) == ([], [])
    assert {len(each) for each in best.top_logprobs} == {2}
    with pytest.raises(ParamsError, match=r"n_beam=2\) cannot return log-probabilities"):
        generate_batch(
            MODEL, tiny_tokenizer, ["a"], max_new_tokens=5, sampling=KINDS[0], search=Search(n_beam=2), n_logprobs=0
        )


def test_nothing_runs_where_nothing_was_added():
    running = Running(MODEL)
    running.add([])
    assert running.step() == []
