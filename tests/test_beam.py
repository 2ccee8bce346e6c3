"""Beam search gives the same texts as transformers; the best of several texts is the likeliest per token."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import math
from itertools import product

import pytest
import torch
from conftest import FAMILIES, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from tinygpt.errors import UserError
from tinygpt.export.hf import export_hf
from tinygpt.generate import Sampling, Search, generate, generate_batch, stream
from tinygpt.generate.answer import Answer
from tinygpt.generate.stream import beam_search

GREEDY = Sampling(temperature=0)
PROMPTS = [[1], random_ids(7).tolist(), random_ids(20, seed=1).tolist()]
ENDS = tuple(range(1, 300, 4))  # every fourth id ends a text, so that beams end at different lengths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_tokenizer):
    """Our models, and their exports in transformers."""
    found = {}
    for name, changes in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, **changes)
        tiny_tokenizer.save(folder)
        export_hf(model, tiny_tokenizer, folder, folder / "hf")
        found[name] = model, AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    return found


def ours(model, tokenizer, prompt, search, sampling, n):
    answer = Answer(prompt, tokenizer, sampling, max_new_tokens=n, block_size=model.config.block_size)
    beam_search(model, answer, search)
    return answer


def theirs(model, prompt, search, *, n, ends, **options):
    ids = torch.tensor([prompt])
    early = {"false": False, "true": True, "never": "never"}[search.early_stopping]
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=search.n_beam,
            length_penalty=search.length_penalty,
            early_stopping=early,
            max_new_tokens=n,
            eos_token_id=ends,
            pad_token_id=0,
            **options,
        )[0, len(prompt) :].tolist()
    return written[: next((i for i, each in enumerate(written) if each in ends), len(written))]


@pytest.mark.parametrize(
    ("family", "length_penalty", "early_stopping"),
    [
        *product(["llama"], [-1.0, 0.0, 1.0, 2.5], ["false", "true", "never"]),
        # Texts are scored from logits in every family; families differ only in how their rows are kept.
        *product(sorted(set(FAMILIES) - {"llama"}), [-1.0, 1.0], ["never"]),
    ],
)
def test_beams_give_the_same_ids_as_transformers(family, length_penalty, early_stopping, pairs, tiny_tokenizer):
    model, hf = pairs[family]
    lengths = set()
    for n_beam, ends in ((2, ENDS), (5, ()), (5, ENDS)):
        search = Search(n_beam=n_beam, length_penalty=length_penalty, early_stopping=early_stopping)
        sampling = dataclasses.replace(GREEDY, stop_ids=ends)
        for prompt in PROMPTS:
            found = ours(model, tiny_tokenizer, prompt, search, sampling, 12)
            expected = theirs(hf, prompt, search, n=12, ends=[tiny_tokenizer.eos_id, *ends])
            assert found.ids == expected
            assert found.finish_reason == ("length" if len(expected) == 12 else "stop")
            lengths.add(len(expected))
    assert len(lengths) > 1 or length_penalty > 0  # a penalty above 0 favours long texts


@pytest.mark.parametrize(
    ("ours_", "theirs_"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_new_tokens": 6}, {"min_new_tokens": 6}),
        ({"banned_ids": (3, 9), "logit_bias": ((7, 2.0),)}, {"suppress_tokens": [3, 9], "sequence_bias": {(7,): 2.0}}),
    ],
)
def test_beams_give_the_same_ids_as_transformers_with_penalties(ours_, theirs_, pairs, tiny_tokenizer):
    model, hf = pairs["llama"]
    for prompt in PROMPTS:
        sampling = Sampling(temperature=0, stop_ids=ENDS, **ours_)
        found = ours(model, tiny_tokenizer, prompt, Search(n_beam=3), sampling, 15)
        assert found.ids == theirs(hf, prompt, Search(n_beam=3), n=15, ends=[tiny_tokenizer.eos_id, *ENDS], **theirs_)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers_with_penalties_too(family, pairs, tiny_tokenizer):
    model, hf = pairs[family]
    for options in ({}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}):
        for prompt in ("", "the file", "don't it's über"):
            sampling = Sampling(temperature=0, stop_ids=ENDS if options else (), **options)
            (found,) = generate_batch(model, tiny_tokenizer, [prompt], max_new_tokens=20, sampling=sampling)
            ids = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode(prompt)]
            ends = [tiny_tokenizer.eos_id, *sampling.stop_ids]
            assert found.ids == theirs(hf, ids, Search(), n=20, ends=ends, **options)


def test_as_many_beams_as_there_are_texts_find_the_likeliest_of_all(tiny_tokenizer):
    model = tiny_model(vocab_size=300)
    allowed = [5, 6, 7]
    sampling = Sampling(temperature=0, banned_ids=tuple(i for i in range(300) if i not in allowed))
    found = ours(model, tiny_tokenizer, [1, 2], Search(n_beam=27), sampling, 3)
    texts = torch.cartesian_prod(*[torch.tensor(allowed)] * 3)
    with torch.inference_mode():
        logits = model(torch.cat([torch.tensor([[1, 2]]).expand(27, 2), texts], 1))[:, 1:-1]
    # other ids may be left out: they do not change which text of a length is the likeliest
    scores = logits.log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2))
    assert found.ids == texts[scores.argmax()].tolist()


def test_a_stop_text_ends_beams_and_is_left_out(tiny_tokenizer):
    model = tiny_model(vocab_size=300)
    search = Search(n_beam=3)
    whole = generate(model, tiny_tokenizer, "the", max_new_tokens=20, sampling=GREEDY, search=search)
    stop = dataclasses.replace(GREEDY, stop=tuple(set(whole[3:6])))
    cut = generate(model, tiny_tokenizer, "the", max_new_tokens=20, sampling=stop, search=search)
    assert not set(cut) & set(whole[3:6])
    assert list(stream(model, tiny_tokenizer, "the", max_new_tokens=20, sampling=GREEDY, search=search)) == [whole]


def test_where_no_token_is_left_there_is_no_text(tiny_tokenizer):
    sampling = Sampling(temperature=0, banned_ids=tuple(range(300)))
    answer = ours(tiny_model(), tiny_tokenizer, [1], Search(n_beam=2), sampling, 5)
    assert (answer.ids, answer.text, answer.finish_reason) == ([], "", "stop")


def test_logits_that_are_not_numbers_are_an_error_in_a_search_too(tiny_tokenizer):
    model = tiny_model()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="the logits are not finite numbers"):
        ours(model, tiny_tokenizer, [1], Search(n_beam=2), GREEDY, 5)


def test_beams_continue_past_the_end_of_the_context(tiny_tokenizer):
    model = tiny_model(block_size=16)
    for when_full, length in (("slide", 40), ("stop", 14)):
        sampling = Sampling(temperature=0, ignore_eos=True, when_full=when_full)
        assert len(ours(model, tiny_tokenizer, [1, 2], Search(n_beam=3), sampling, 40).ids) == length


def test_the_best_of_n_is_the_likeliest_per_token_of_n_seeds(tiny_tokenizer):
    model = tiny_model()
    sampling = Sampling(seed=2**32 - 2, temperature=0.9, ignore_eos=True, stop=("a", "e", "t"))
    prompts = ["the", "a list of", "the"]
    best = generate_batch(model, tiny_tokenizer, prompts, max_new_tokens=9, sampling=sampling, search=Search(best_of=4))
    for prompt, found in zip(prompts, best, strict=True):
        scores = {}
        for seed in (2**32 - 2, 2**32 - 1, 0, 1):  # four seeds from the first one on
            one = dataclasses.replace(sampling, seed=seed)
            (answer,) = generate_batch(model, tiny_tokenizer, [prompt], max_new_tokens=9, sampling=one)
            scores[tuple(answer.ids)] = mean_logprob(model, answer)
        assert len({len(ids) for ids in scores}) > 1
        assert tuple(found.ids) == max(scores, key=scores.get)
        assert math.isclose(found.mean_logprob(), max(scores.values()), rel_tol=1e-4)


def mean_logprob(model, answer) -> float:
    """The mean log-probability of the answer's ids, from one forward pass over prompt and answer."""
    new = torch.tensor(answer.ids)[:, None]
    with torch.inference_mode():
        logprobs = model(torch.tensor([answer.prompt + answer.ids]))[0, -1 - len(new) : -1].log_softmax(-1)
    return float(logprobs.gather(1, new).mean())
