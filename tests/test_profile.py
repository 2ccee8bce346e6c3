"""What a run will cost: computed by hand, and compared with a real run."""

import dataclasses
import re

import pytest
import torch
from conftest import RUNTIME, random_ids, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from project import set_params
from test_presets import params  # noqa: F401  a folder with params.yaml
from test_train import PARAMS
from torch.utils._python_dispatch import TorchDispatchMode

from tinygpt.model.gpt import GPT
from tinygpt.model.inside import parts_of
from tinygpt.model.products import fast_products
from tinygpt.plan import measure
from tinygpt.plan.measure import flops_per_token, peak_flops, tokens_per_second
from tinygpt.run import costs as memory_module
from tinygpt.run.costs import build_trained, fits, memory_of, most_activations
from tinygpt.train.config import EMAParams, LoRAParams
from tinygpt.train.learner import Learner
from tinygpt.train.loss import next_token_loss
from tinygpt.train.optim import build_optimizers, optimizer_tensors

CPU = torch.device("cpu")
LORA = LoRAParams(rank=2, alpha=4.0, dropout=0.5, targets=("q_proj", "down_proj"))


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Measure quickly: these tests need no good timings."""
    monkeypatch.setattr(measure, "MEASURE_S", 0.02)
    monkeypatch.setitem(measure.MATMUL_SIZE, "cpu", 256)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False, "position": "learned", "bias": "all", "qk_norm": True}])
def test_the_parts_have_all_the_weights(changes):
    model = GPT(tiny_config(**changes))
    assert sum(part.n_weights for part in parts_of(model).values()) == model.n_params()
    assert parts_of(model)["embedding"].n_weights == 300 * 32


def test_operations_by_hand():
    config = tiny_config(n_layer=2, n_head=4, n_embd=32, n_hidden=64, block_size=64, vocab_size=300, n_kv_head=2)
    matrices = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 300
    attention = 2 * 2 * 2 * 32 * 32.5  # a token sees 32.5 tokens on average
    assert flops_per_token(config) == 3 * (2 * matrices + attention)
    windowed = tiny_config(n_layer=2, n_embd=32, n_hidden=64, block_size=64, n_kv_head=2, window=2, full_every=2)
    seen = (32.5 + (1 + 63 * 2) / 64) / 2
    assert flops_per_token(windowed) == 3 * (2 * matrices + attention / 32.5 * seen)


def kept_by_a_step(model) -> int:
    """Bytes that a real forward pass of 4 sequences keeps for the backward pass, its logits and log-probabilities."""
    ids, kept = random_ids(4, 65), {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with fast_products(CPU), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = next_token_loss(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
    assert loss.isfinite()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights) + 2 * 4 * 4 * 64 * model.config.vocab_size


def memory(config, train=PARAMS, **runtime):
    return memory_of(config, train, dataclasses.replace(RUNTIME, **runtime), 4, CPU)


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "norm": "layernorm", "position": "learned"}, {"window": 8}])
def test_activations_counted_without_computing_are_those_of_a_real_step(changes):
    model = GPT(tiny_config(**changes))
    counted = memory(model.config)
    assert counted.activations == pytest.approx(kept_by_a_step(model), rel=0.01)
    assert counted.weights == counted.gradients == counted.optimizer / 2 == 4 * model.n_params()
    assert counted.kv_cache == 2 * 4 * 2 * 4 * 8 * changes.get("window", 64)


@given(
    changes=st.fixed_dictionaries(
        {
            "n_layer": st.integers(1, 3),
            "n_embd": st.sampled_from([16, 64, 128]),
            "head_dim": st.sampled_from([None, 8, 64]),
            "n_hidden": st.sampled_from([None, 32]),
            "n_kv_head": st.sampled_from([None, 1, 2]),
            "block_size": st.sampled_from([16, 64, 256]),
            "position": st.sampled_from(["rope", "learned"]),
            "norm": st.sampled_from(["rmsnorm", "layernorm"]),
            "mlp": st.sampled_from(["swiglu", "gelu", "relu2"]),
            "bias": st.sampled_from(["none", "qkv", "all"]),
            "window": st.sampled_from([None, 8]),
            "dropout": st.sampled_from([0.0, 0.1]),
            "attention": st.sampled_from(["sdpa", "explicit"]),
        }
        | {name: st.booleans() for name in ("parallel_block", "qk_norm", "tie_weights")}
    ),
    precision=st.sampled_from(["fp32", "bf16"]),
    lora=st.sampled_from([None, LORA, dataclasses.replace(LORA, targets=None)]),
    size=st.integers(1, 4),
)
@settings(max_examples=30)
def test_the_bound_of_activations_is_above_what_any_model_keeps(changes, precision, lora, size):
    train = dataclasses.replace(PARAMS, precision=precision, init_from="base", lora=lora)
    config = tiny_config(**changes)
    counted = memory_of(config, train, RUNTIME, size, CPU).activations
    assert counted <= most_activations(build_trained(config, lora), size)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_is_counted_exactly_only_where_it_is_close(optimizer, monkeypatch):
    train = dataclasses.replace(PARAMS, optimizer=optimizer, ema=EMAParams(decay=0.9, start=0))
    learner = Learner(GPT(tiny_config()), train, RUNTIME, device=CPU)
    exact = memory(learner.model.config, train)
    needed = exact.training - exact.weights
    for free, expected in ((needed, False), (needed + 1, True)):
        monkeypatch.setattr(memory_module, "available_memory", lambda device, free=free: free)
        assert fits(learner, 4) == expected
    monkeypatch.setattr(memory_module, "available_memory", lambda device: 10 * needed)
    monkeypatch.setattr(memory_module, "memory_of", lambda *_: pytest.fail("counted exactly"))
    assert fits(learner, 4)


def test_blocks_that_are_computed_again_keep_their_input_and_one_of_them_the_rest():
    x, one, two, ten = 4 * 4 * 64 * 32, *(tiny_config(n_layer=n) for n in (1, 2, 10))
    inside = memory(two).activations - memory(one).activations
    assert inside > 8 * x
    recomputed = [memory(config, gradient_checkpointing=True).activations for config in (one, two, ten)]
    assert recomputed[1] - recomputed[0] == x
    assert recomputed[2] == pytest.approx(memory(one).activations + 9 * x, rel=0.01)


def test_low_precision_products_keep_less():
    whole, half = (
        memory(tiny_config(), dataclasses.replace(PARAMS, precision=p)).activations for p in ("fp32", "bf16")
    )
    assert 0.5 < half / whole < 0.95


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_adapters_only_their_gradients_and_optimizer_state_are_counted(dropout):
    lora = dataclasses.replace(LORA, dropout=dropout)
    model = build_trained(tiny_config(), lora)
    n_adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = memory(model.config, dataclasses.replace(PARAMS, init_from="base", lora=lora))
    assert n_adapters == 2 * 2 * (32 + 32 + 96 + 32)
    assert counted.gradients == counted.optimizer / 2 == 4 * n_adapters
    assert counted.weights == 4 * model.n_params() == 4 * (GPT(model.config).n_params() + n_adapters)
    assert counted.activations == pytest.approx(kept_by_a_step(model), rel=0.01)
    frozen = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 32 * 300
    attention = 2 * 2 * 2 * 32 * 32.5
    assert flops_per_token(model.config, lora) == 2 * (2 * frozen + 3 * n_adapters) + 3 * attention


def test_adapters_of_embeddings_and_head_cost_a_whole_head():
    lora = dataclasses.replace(LORA, targets=("tok_emb", "lm_head"))
    model = build_trained(tiny_config(tie_weights=False), lora)
    n_adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = memory(model.config, dataclasses.replace(PARAMS, init_from="base", lora=lora))
    blocks, head = 2 * (4 * 32 * 32 + 3 * 32 * 96), 32 * 300
    assert n_adapters == 2 * 2 * (300 + 32)
    assert counted.gradients == counted.optimizer / 2 == 4 * n_adapters
    assert counted.activations == pytest.approx(kept_by_a_step(model) + 4 * head, rel=0.01)
    attention = 2 * 2 * 2 * 32 * 32.5
    assert flops_per_token(model.config, lora) == 2 * (2 * blocks + 3 * (head + 2 * 32)) + 3 * attention


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("ema", [None, EMAParams(decay=0.9, start=0)])
def test_the_state_that_is_counted_is_what_a_step_leaves(optimizer, ema):
    train = dataclasses.replace(PARAMS, optimizer=optimizer, ema=ema)
    model = GPT(tiny_config(tie_weights=False))
    optimizers = build_optimizers(model, train)
    next_token_loss(model.hidden(random_ids(2, 9)), model.lm_head.weight, random_ids(2, 9)).backward()
    for each in optimizers:
        each.step()
    steps = 4 * len(list(model.parameters()))  # AdamW counts them
    state = sum(tensor.nbytes for tensor in optimizer_tensors(model, optimizers).values())
    average = 4 * model.n_params() if ema else 0
    counted = memory(model.config, train).optimizer
    assert state + average - steps <= counted <= state + average


def test_speeds_are_measured():
    learner = Learner(GPT(tiny_config()), PARAMS, RUNTIME, device=CPU)
    assert tokens_per_second(learner) > 100


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_peak_is_that_of_products_in_the_runs_precision(precision, dtype):
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                dtypes.update(arg.dtype for arg in args)
            return func(*args, **(kwargs or {}))

    with Products():
        assert peak_flops(CPU, precision) > 1e8
    assert dtypes == {dtype}


def test_profile_prints_the_costs_and_warns_of_a_run_that_will_not_fit(params, command):  # noqa: F811
    folder = params.parent
    said = command("profile")
    for words in ("weights     1,066,368: embedding 131,072", "operations", "training", "generation", "MFU"):
        assert words in said.stdout
    assert "profile: timing at least two training steps of 1,024 tokens, which --no-measure skips" in said.stderr
    assert f" in {1600 * 4 * 256:,} tokens" in said.stdout
    lora = {"rank": 8, "alpha": 16, "dropout": 0, "targets": ["q_proj", "v_proj"]}
    set_params(folder, {"train.init_from": "base", "train.lora": lora})
    said = command("profile", "--no-measure")
    assert "adapters    16,384 weights of attention; only these are trained" in said.stdout
    assert "speed" not in said.stdout and "measures" not in said.stderr
    set_params(folder, {"train.init_from": "scratch", "train.lora": None, "runtime.micro_batch_size": "auto"})
    set_params(folder, {"model.n_layer": 1, "model.n_embd": 32})
    said = command("profile").stdout
    found = re.search(r"^micro-batches of (\d) of the 4 sequences of a step: the fastest of 4, 2, 1$", said, re.M)
    assert f"of {found.group(1)} sequences" in said
    said = command("profile", "--no-measure").stdout
    assert "of 4 sequences" in said
    set_params(folder, {"train.batch_size": 2**22})  # of which the whole does not fit
    said = command("profile", "--no-measure")
    assert said.returncode == 0 and "of 4194304 sequences" not in said.stdout
    set_params(folder, {"train.batch_size": 4, "tokenizer.kind": "byte", "runtime.micro_batch_size": None})
    assert f"embedding {257 * 32:,}" in command("profile", "--no-measure").stdout
    set_params(folder, {"runtime.n_process": 2})
    said = command("profile", "--no-measure").stdout
    assert "\nprocesses   2: what follows is for each of them\n" in said and "of 2 sequences" in said
    set_params(folder, {"runtime.parallel": "fsdp"})
    split = command("profile")
    whole, part = (float(re.search(r"training .*: weights ([\d.]+) kB", text)[1]) for text in (said, split.stdout))
    assert part == pytest.approx(whole / 2, rel=0.02)
    assert split.stdout.count("generation") == 1 and "speed       not measured: with" in split.stdout
    set_params(folder, {"runtime.parallel": "ddp"})
    set_params(folder, {"model.n_embd": 2**17, "runtime.n_process": 1})  # terabytes in one layer
    said = command("profile")
    assert said.returncode == 1
    assert "error: the run will not fit: lower runtime.micro_batch_size" in said.stderr
