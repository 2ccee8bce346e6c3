"""Evaluation: every token is scored once, in known units."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.errors import UserError
from tinygpt.files import write_json
from tinygpt.generate import Sampling, generate_batch
from tinygpt.params import ParamsError
from tinygpt.report.config import EvaluateParams
from tinygpt.report.details import make_samples, write_samples
from tinygpt.report.perplexity import (
    estimate,
    evaluate_model,
    iter_windows,
    llamacpp_report,
    perplexity,
    token_nll,
)

PARAMS = EvaluateParams(
    split="test",
    context=None,
    stride=None,
    prompts=("", "the"),
    held_out_prompts=0,
    max_new_tokens=5,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=1,
)


@given(n_tokens=st.integers(2, 200), context=st.integers(1, 50), data=st.data())
def test_windows_score_every_token_but_the_first_once_with_all_the_context_there_is(n_tokens, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(iter_windows(n_tokens, context, stride))
    scored = [token for _, first, end in windows for token in range(first, end)]
    assert scored == list(range(1, n_tokens))
    for start, first, end in windows:
        assert 0 <= start < first < end
        assert end - 1 - start <= context
        assert start == 0 or end - 1 - start == context


def test_windows_by_hand():
    assert list(iter_windows(7, 4, 2)) == [(0, 1, 5), (2, 5, 7)]
    assert list(iter_windows(6, 4, 4)) == [(0, 1, 5), (1, 5, 6)]


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (9, 1)])
def test_nll_is_that_of_each_window_alone(context, stride):
    model = tiny_model(block_size=16)
    tokens = np.random.default_rng(0).integers(0, 300, 70).astype(np.uint16)
    nll = token_nll(model, tokens, context=context, stride=stride)
    for start, first, end in iter_windows(len(tokens), context, stride):
        ids = torch.from_numpy(tokens[start:end].astype(np.int64))
        with torch.inference_mode():
            logprobs = model(ids[None, :-1])[0].log_softmax(-1)
        expected = -logprobs.gather(1, ids[1:, None])[:, 0].numpy()[first - start - 1 :]
        np.testing.assert_allclose(nll[first - 1 : end - 1], expected, rtol=1e-4, atol=1e-5)


def test_a_perplexity_that_overflows_is_reported_and_not_written(tmp_path):
    model = tiny_model(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    report = evaluate_model(model, np.arange(100, dtype=np.uint16), PARAMS, n_bytes=50)
    assert 710 < report["loss"] < math.inf and report["ppl"] == math.inf
    with pytest.raises(UserError, match=r"eval.json was not written \(.* inf\): .*lower train.lr"):
        write_json(tmp_path / "eval.json", report)
    assert not list(tmp_path.iterdir())
    assert perplexity(709.7) == math.exp(709.7)


def test_a_split_without_a_byte_of_text_is_refused():
    with pytest.raises(ParamsError, match=r"the test split has no text, only 3 tokens"):
        evaluate_model(tiny_model(), np.zeros(3, np.uint16), PARAMS, n_bytes=0)


def test_a_mean_and_its_error_by_hand():
    assert estimate(np.array([1.0, 2.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2 / 3) / math.sqrt(2)))


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary():
    model = tiny_model(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = np.random.default_rng(0).integers(0, 300, 300).astype(np.uint16)
    report = evaluate_model(model, tokens, PARAMS, n_bytes=598)
    assert report["ppl"] == pytest.approx(300, rel=1e-5)
    assert report["bpb"] == pytest.approx(math.log2(300) / 2, rel=1e-5)
    assert report["loss_error"] == pytest.approx(0, abs=1e-6)
    assert report["llamacpp"]["ppl"] == pytest.approx(300, rel=1e-5)
    assert (report["tokens"], report["context"], report["stride"]) == (299, 64, 64)


def test_llamacpps_protocol_scores_the_second_half_of_whole_chunks():
    model = tiny_model(block_size=16)
    tokens = np.random.default_rng(0).integers(0, 300, 39).astype(np.uint16)
    report = llamacpp_report(model, tokens, n_ctx=16)
    assert report["tokens"] == 2 * 7
    losses = []
    for chunk in (tokens[:16], tokens[16:32]):
        ids = torch.from_numpy(chunk.astype(np.int64))
        with torch.inference_mode():
            logprobs = model(ids[None])[0].log_softmax(-1)
        losses += [-logprobs[i, ids[i + 1]].item() for i in range(8, 15)]
    assert report["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert llamacpp_report(model, tokens[:10], n_ctx=16) == {"n_ctx": 16}


@pytest.mark.parametrize(("n_tokens", "stride"), [(48, None), (49, None), (55, None), (55, 8), (15, None)])
def test_an_evaluation_that_shares_its_windows_with_llamacpps_protocol_changes_nothing(n_tokens, stride):
    model, params = tiny_model(block_size=16), dataclasses.replace(PARAMS, stride=stride)
    tokens = np.random.default_rng(0).integers(0, 300, n_tokens).astype(np.uint16)
    shared = evaluate_model(model, tokens, params, n_bytes=n_tokens)["llamacpp"]
    assert shared == pytest.approx(llamacpp_report(model, tokens, n_ctx=16), rel=1e-6)


def test_a_context_beyond_the_model_and_a_stride_beyond_the_context_are_refused_together():
    params = dataclasses.replace(PARAMS, context=100, stride=200)
    with pytest.raises(ParamsError) as caught:
        evaluate_model(tiny_model(), np.zeros(10, np.uint16), params, n_bytes=1)
    assert caught.value.problems == [
        "evaluate.context=100 must be at most model.block_size=64: set it to null",
        "evaluate.stride=200 must be at most evaluate.context=100: set it to null",
    ]


def test_samples_are_written_for_each_prompt_and_the_same_each_time(tiny_tokenizer, tmp_path):
    for name in ("a.md", "b.md"):
        samples = make_samples(tiny_model(), tiny_tokenizer, np.zeros(2, np.uint16), PARAMS)
        write_samples(tmp_path / name, samples)
    text = (tmp_path / "a.md").read_text()
    assert text == (tmp_path / "b.md").read_text()
    assert text.count("## Prompt: ") == 2
    assert "## Prompt: (none)" in text
    assert "```text\nthe" in text


def test_markdown_in_a_prompt_does_not_break_the_page(tiny_tokenizer, tmp_path):
    prompts = ("```python\nx = 1\n```", "````", "*a* `b`", "\x1b[2J")
    params = dataclasses.replace(PARAMS, prompts=prompts)
    write_samples(tmp_path / "a.md", make_samples(tiny_model(), tiny_tokenizer, np.zeros(2, np.uint16), params))
    lines = (tmp_path / "a.md").read_text().split("\n")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == [
        "## Prompt: \\`\\`\\`python\\\\nx = 1\\\\n\\`\\`\\`",
        "## Prompt: \\`\\`\\`\\`",
        "## Prompt: \\*a\\* \\`b\\`",
        "## Prompt: \\\\x1b\\[2J",
    ]
    text = "\n".join(lines)
    for fence, prompt in zip(("````", "`````", "```", "```"), prompts, strict=True):
        assert f"\n{fence}text\n{prompt}" in text


def test_options_of_the_samples_are_those_of_sampling_in_type_and_value(tiny_tokenizer):
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    params, model = dataclasses.replace(PARAMS, max_new_tokens=30, **options), tiny_model()
    sampling = Sampling(**options)
    expected = generate_batch(model, tiny_tokenizer, params.prompts, max_new_tokens=30, sampling=sampling)
    samples = make_samples(model, tiny_tokenizer, np.zeros(2, np.uint16), params)
    assert [sample.text for sample in samples] == [answer.text for answer in expected]
    ours, theirs = (typing.get_type_hints(cls, include_extras=True) for cls in (EvaluateParams, Sampling))
    for name in ours.keys() & theirs.keys():  # Sampling's types also have help texts
        assert typing.get_args(ours[name]) == typing.get_args(theirs[name])[:2], name
