"""What only a GPU does: CUDA graphs, its number formats, asynchronous copies, the same bits twice."""

import dataclasses

import pytest
import torch
from conftest import RUNTIME, random_ids, tiny_config, tiny_model
from test_train import PARAMS, fit, runs_in_tmp, same, tokens  # noqa: F401  runs_in_tmp is used by pytest

from tinygpt.errors import Stopped, UserError
from tinygpt.generate.decoder import Decoder
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import quantize
from tinygpt.run.costs import LESS_MEMORY, find_micro_batch_size, memory_of
from tinygpt.runtime import out_of_memory
from tinygpt.train.batches import on_device
from tinygpt.train.learner import Learner
from tinygpt.train.loss import repeatable
from tinygpt.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda")
WAYS = {
    "eager": dataclasses.replace(RUNTIME, device="cuda"),
    "compiled": dataclasses.replace(RUNTIME, device="cuda", compile=True),
    "recorded": dataclasses.replace(RUNTIME, device="cuda", compile=True, cuda_graphs=True),
}
SIZES = {"n_embd": 128, "block_size": 256}  # heads of 32, a size that flash attention supports


def make_learner(way: str = "eager", *, device: torch.device = GPU, **changes) -> Learner:
    model_changes = {name: changes.pop(name) for name in list(changes) if name not in vars(PARAMS)}
    config = tiny_config(**(SIZES | model_changes))
    model = GPT(config, generator=torch.Generator().manual_seed(1))
    runtime = WAYS[way] if device.type == "cuda" else RUNTIME
    return Learner(model, dataclasses.replace(PARAMS, **changes), runtime, device=device)


def losses(learner: Learner, n: int = 6) -> list[float]:
    batches = (random_ids(4, learner.config.block_size + 1, seed=step).to(learner.device) for step in range(n))
    return [learner.learn(step, ids)[0].item() for step, ids in enumerate(batches)]


def kernels_of(action) -> set[str]:
    with torch.profiler.profile() as profiled:
        action()
        torch.cuda.synchronize()
    return {event.name for event in profiled.events()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_graphs_are_recorded_and_compute_what_the_compiled_step_does(dropout):
    compiled, recorded = (make_learner(way, dropout=dropout, precision="bf16") for way in ("compiled", "recorded"))
    assert losses(recorded) == pytest.approx(losses(compiled), abs=2e-3)
    ids = random_ids(4, 257).to(GPU)
    assert any("cudaGraphLaunch" in name for name in kernels_of(lambda: recorded.learn(6, ids)))
    assert not any("cudaGraphLaunch" in name for name in kernels_of(lambda: compiled.learn(6, ids)))


@pytest.mark.parametrize("precision, within", [("fp32", 1e-4), ("tf32", 2e-3), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_the_first_losses_are_those_of_a_cpu_in_each_precision(precision, within):
    expected = losses(make_learner(device=torch.device("cpu"), precision="fp32"))
    assert losses(make_learner(precision=precision)) == pytest.approx(expected, abs=within)


def test_tf32_switches_products_and_auto_takes_bf16():
    a = torch.randn(512, 512, device=GPU)
    exact = (a.double() @ a.double()).float()
    errors = {}
    for precision in ("tf32", "fp32"):
        make_learner(precision=precision)
        errors[precision] = (a @ a - exact).norm() / exact.norm()
    assert errors["fp32"] < 1e-6 < 1e-4 < errors["tf32"] < 1e-3
    assert make_learner(precision="auto").precision == "bf16"


def test_batches_are_copied_from_pinned_memory_without_waiting(monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda ids: pinned.append(pin(ids)) or pinned[-1])
    for step in range(5):
        ids = on_device(random_ids(4, 65, seed=step).numpy(), GPU)
        assert ids.is_cuda and torch.equal(ids.cpu(), random_ids(4, 65, seed=step))
    assert len(pinned) == 5 and all(ids.is_pinned() for ids in pinned)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes", [{"optimizer": "muon"}, {"optimizer": "adamw", "n_kv_head": 2, "window": 100}], ids=str
)
def test_two_learners_have_the_same_bits(way, changes):
    one, other = (make_learner(way, precision="bf16", dropout=0.1, **changes) for _ in range(2))
    assert losses(one) == losses(other)
    assert same(one.tensors()["weights"], other.tensors()["weights"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_a_stopped_run_continues_to_the_same_bits(way, optimizer, monkeypatch):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")

    def trainer() -> Trainer:
        learner = make_learner(way, optimizer=optimizer, precision="auto", dropout=0.1, block_size=64)
        return Trainer(learner, train_tokens=tokens(), val_tokens=tokens(800))

    undisturbed = fit(trainer(), "undisturbed")
    for stop_at in (3, 7):
        stopped = trainer()
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(
                "tinygpt.run.run.Run.stop_requested", lambda run, at=stop_at, of=stopped: 15 * (of.state.step == at)
            )
            fit(stopped, "stopped")
    resumed = fit(trainer(), "stopped")
    assert same(resumed.last, undisturbed.last)
    assert same(resumed.best, undisturbed.best)


def test_determinism_is_not_set_for_the_whole_process():
    make_learner().learn(0, random_ids(4, 257).to(GPU))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), repeatable(GPU):
        assert torch.are_deterministic_algorithms_enabled()
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def little_memory():
    """Limit the GPU to 4 GiB."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**32 / torch.cuda.get_device_properties(GPU).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_is_one_line_and_a_broken_kernel_is_not(little_memory):
    learner = make_learner(batch_size=2**15)
    with pytest.raises(UserError, match=r"^out of memory: lower runtime\.micro_batch_size"), out_of_memory(LESS_MEMORY):
        learner.learn(0, torch.zeros(2**15, 257, dtype=torch.long, device=GPU))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**33, dtype=torch.uint8, device=GPU)
    with pytest.raises(NotImplementedError), out_of_memory(LESS_MEMORY):
        raise NotImplementedError


def test_micro_batches_are_the_largest_that_fit(little_memory, capsys):
    learner = make_learner(batch_size=2**15)
    before = torch.cuda.get_rng_state()
    size = find_micro_batch_size(learner)
    assert 1 < size < 2**15
    assert "the largest that fits" in capsys.readouterr().out
    assert torch.equal(torch.cuda.get_rng_state(), before)
    learner.micro_batch_size = size
    learner.learn(0, torch.zeros(2 * size, 257, dtype=torch.long, device=GPU))


def test_memory_is_counted_for_a_gpus_kernels():
    learner = make_learner(batch_size=64)
    counted = memory_of(learner.config, learner.params, learner.runtime, 64, GPU).training
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        learner.learn(step, torch.zeros(64, 257, dtype=torch.long, device=GPU))
    assert 0.5 < torch.cuda.max_memory_allocated() / counted < 2


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("n_row", [1, 40])
def test_decoding_on_a_gpu_gives_the_logits_of_a_cpu(kind, n_row):
    models = [
        tiny_model(n_kv_head=2, qk_norm=True, window=20, full_every=2, vocab_size=304).to(d) for d in ("cpu", GPU)
    ]
    if kind:
        for model in models:
            quantize(model, kind)
    prompts = random_ids(n_row, 30).tolist()
    cpu, gpu = (Decoder(model, prompts) for model in models)
    for step in range(10):
        within = 0.05 if kind else 1e-3  # int8 and int4 multiply in bfloat16 on a CPU
        torch.testing.assert_close(gpu.logits.cpu(), cpu.logits, rtol=within, atol=10 * within)
        for decoder in (cpu, gpu):
            decoder.step([step] * n_row)
