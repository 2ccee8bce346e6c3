"""A trained model of every family writes the same in PyTorch, transformers and llama.cpp, for prompts in any script."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from conftest import prose, tiny_config
from transformers import AutoModelForCausalLM

from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.generate import Sampling, stream
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.train.config import TrainParams
from tinygpt.train.loss import next_token_loss
from tinygpt.train.optim import build_optimizers, set_lr

pytestmark = pytest.mark.slow

N_NEW, N_TOP, STEPS = 64, 5, 40
PROMPTS = ["the naïve façade über", "中文 данные 42", "returns a list’s 🙂 file"]
LAYERNORM = {"norm": "layernorm"}
GELU = LAYERNORM | {"mlp": "gelu"}
# Name -> switches, whether transformers has a class for them, whether llama.cpp has an architecture.
FAMILIES = {
    "gpt2": (GELU | {"position": "learned", "bias": "all", "tie_weights": True}, True, True),
    "llama": ({"n_kv_head": 2}, True, True),
    "llama, window": ({"window": 24, "bias": "none"}, True, True),
    "qwen3": ({"qk_norm": True, "bias": "qkv", "head_dim": 24}, True, True),
    "starcoder2": (GELU | {"bias": "all", "n_kv_head": 1}, True, True),
    "phi2": (GELU | {"bias": "all", "parallel_block": True}, True, True),
    "stablelm": (LAYERNORM | {"qk_norm": True, "bias": "qkv", "n_kv_head": 2}, True, True),
    "stablelm, parallel": (LAYERNORM | {"parallel_block": True}, True, True),
    "cohere2": (LAYERNORM | {"parallel_block": True, "tie_weights": True, "window": 24}, True, True),
    "arcee": ({"mlp": "relu2", "tie_weights": False}, True, True),
    "arcee, gelu": ({"mlp": "gelu"}, True, False),
    "plamo": ({"parallel_block": True, "bias": "qkv"}, False, True),
}


def trained(changes, tokenizer) -> GPT:
    """A model trained on `prose` with the optimizers of params.yaml, until its choices are clear."""
    model = GPT(tiny_config(**{"n_embd": 64, "block_size": 128} | changes), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer.encode(prose(4000, seed=1)))
    optimizers = build_optimizers(model, load_params(TrainParams))
    places = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        begin = torch.randint(len(ids) - 65, (4, 1), generator=places)
        batch = ids[begin + torch.arange(65)]
        loss = next_token_loss(model.hidden(batch[:, :-1]), model.lm_head.weight, batch[:, 1:])
        loss.backward()
        set_lr(optimizers, min(1, (step + 1) / 10))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 3  # it was 5.7 at first, and is 2.3 now
    return model.eval()


def top(logits) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens and their log-probabilities."""
    found = torch.as_tensor(logits).log_softmax(-1).topk(N_TOP)
    return found.indices.tolist(), found.values.numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_continuation_and_the_same_likeliest_tokens(name, tmp_path, tiny_tokenizer):
    changes, in_transformers, in_llama_cpp = FAMILIES[name]
    model = trained(changes, tiny_tokenizer)
    prompts = [[tiny_tokenizer.eos_id, *tiny_tokenizer.encode(prompt)] for prompt in PROMPTS]
    with torch.inference_mode():
        ours = [top(model(torch.tensor([ids]))[0, -1]) for ids in prompts]
    texts = [greedy(model, ids) for ids in prompts]
    assert len({tuple(text) for text in texts}) > 1
    within = 1e-2 if changes.get("mlp") == "gelu" else 1e-3

    if in_transformers:
        tiny_tokenizer.save(tmp_path)
        export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        for ids, expected, text in zip(prompts, ours, texts, strict=True):
            with torch.inference_mode():
                found = top(theirs(torch.tensor([ids])).logits[0, -1])
                prompt = torch.tensor([ids])
                mask = torch.ones_like(prompt)  # otherwise a first <|endoftext|> would count as padding
                written = theirs.generate(
                    prompt,
                    attention_mask=mask,
                    max_new_tokens=N_NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            assert found[0] == expected[0]
            np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
            assert_same_choices(model, ids, text, written[0, len(ids) :].tolist(), 1e-4)
    if in_llama_cpp:
        export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
        with LlamaCpp(tmp_path / "m.gguf") as llama:
            for ids, expected, text in zip(prompts, ours, texts, strict=True):
                found = top(llama.logits(ids)[-1])
                assert found[0] == expected[0]
                np.testing.assert_allclose(found[1], expected[1], atol=within)
                assert_same_choices(model, ids, text, llama.greedy(ids, N_NEW), within)


def assert_same_choices(model: GPT, prompt: list[int], ours: list[int], theirs: list[int], within: float) -> None:
    """Both are equal to the end, or up to a step where two tokens were so close that rounding decided."""
    differing = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if differing:
        first = differing[0]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + ours[:first]]))[0, -1].log_softmax(-1)
        assert logprobs[ours[first]] - logprobs[theirs[first]] < 2 * within, f"token {first}"


def greedy(model: GPT, ids: list[int]) -> list[int]:
    """The greedy continuation, with each token computed from the whole context."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(N_NEW):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-N_NEW:]


def test_the_command_line_streams_that_continuation(tiny_tokenizer):
    model = trained({}, tiny_tokenizer)
    text = "".join(
        stream(model, tiny_tokenizer, PROMPTS[0], max_new_tokens=N_NEW, sampling=Sampling(temperature=0, seed=0))
    )
    ids = [*tiny_tokenizer.border_ids, *tiny_tokenizer.encode(PROMPTS[0])]
    expected = greedy(model, ids)
    if tiny_tokenizer.eos_id in expected:  # the stream ends there
        expected = expected[: expected.index(tiny_tokenizer.eos_id)]
    assert len(expected) > 5
    assert text == tiny_tokenizer.decode(expected)
