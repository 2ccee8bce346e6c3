"""The parts of benchmarks/gpu.py: each is a function that returns its cases by name; a case yields (what, value, note).

Timed models have GPT-2's mathematics (benchmarks/training.py), in bfloat16 by autocast unless stated otherwise, with
50,304 tokens instead of GPT-2's 50,257. The peak is from the data sheets of the H100 and the H200.
"""

import dataclasses
import functools
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import training
from benchmarks.plain_gpt import PlainGPT, loss_of, validation_loss
from tinygpt.errors import UserError
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.decoder import Decoder
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import quantize
from tinygpt.params import load_params
from tinygpt.plan.measure import flops_per_token
from tinygpt.run.costs import LESS_MEMORY, find_micro_batch_size, memory_of
from tinygpt.runtime import RuntimeParams, out_of_memory, wait_for
from tinygpt.train.batches import Batches, on_device, validation_sequences
from tinygpt.train.config import TrainParams
from tinygpt.train.first_weights import set_first_weights
from tinygpt.train.learner import Learner
from tinygpt.train.loss import Loss, autocast
from tinygpt.train.parallel import Replicas, SplitWeights

PEAK = 989e12  # dense bfloat16 operations per second
MARK = 463_000  # tokens per second that llm.c publishes for GPT-2 124M, context 1024, on each of eight H100
GOAL = 1.4697  # nats per character that nanoGPT publishes for tiny Shakespeare, with 10.7 M weights

Finding = tuple[str, float | str, str]  # what, value, note
Case = Callable[[], Iterable[Finding]]


@dataclass(frozen=True)
class Setup:
    """How much is measured."""

    text: Path | None
    until: float  # when the part must end, as time.time()
    quick: bool = False
    tiny: bool = False  # the smallest sizes
    warm: bool = False  # only compile what will be timed later

    @property
    def device(self) -> torch.device:
        """A GPU, or a CPU to rehearse on."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def brief(self) -> bool:
        """Whether timings do not matter."""
        return self.tiny or self.warm


@dataclass(frozen=True)
class Part:
    """A part and when it runs."""

    cases: Callable[[Setup], dict[str, Case]]
    timed: bool = False  # it needs the GPU to itself
    compiles: bool = False  # and keeps the result on disk, so it does this first, next to other parts
    weight: float = 1.0  # its share of the time of those that are timed


# ---- what all use ----


def model_config(*, vocab_size: int, **changes: Any) -> GPTConfig:
    """The config of params.yaml, with some fields changed."""
    fields = dataclasses.replace(load_params(ModelParams), **(training.DERIVED | changes))
    return GPTConfig(**config_fields(fields), vocab_size=vocab_size)


def build_learner(
    config: GPTConfig, device: torch.device, way: str = "eager", *, micro_batch_size: Any = None, **changes: Any
) -> Learner:
    """params.yaml's training with some fields changed, in one of the ways to run it."""
    params, runtime = load_params(TrainParams, RuntimeParams)
    on_gpu = device.type == "cuda"
    runtime = dataclasses.replace(
        runtime,
        compile=on_gpu and way != "eager",
        cuda_graphs=on_gpu and way == "graphs",
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=False,
    )
    model = GPT(config, generator=torch.Generator().manual_seed(params.seed))
    return Learner(model, dataclasses.replace(params, **changes), runtime, device=device)


def seconds_of(
    action: Callable[[], object], device: torch.device, *, brief: bool, n: int = 10, rounds: int = 7
) -> float:
    """Seconds per action: the median of rounds of n actions."""
    times = []
    for _ in range(1 if brief else rounds):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(1 if brief else n):
            action()
        wait_for(device)
        times.append((time.perf_counter() - began) / (1 if brief else n))
    return median(times)


def peak_gb() -> str:
    """Peak memory since the last call, in words."""
    if not torch.cuda.is_available():
        return ""
    n_bytes = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return f"{n_bytes / 1e9:.1f} GB at most"


def characters(setup: Setup) -> tuple[int, NDArray[np.uint16], NDArray[np.uint16]]:
    """Number of different characters, ids of the first nine tenths as a ring, and ids of the rest."""
    text = setup.text.read_text(encoding="utf-8") if setup.text else "\n".join(p.read_text() for p in _docs())
    kinds, places = np.unique(list(text), return_inverse=True)
    ids = places.astype(np.uint16)
    n_train = len(ids) * 9 // 10
    return len(kinds), np.r_[ids[:n_train], ids[:1]], ids[n_train:]


def _docs() -> list[Path]:
    return sorted(Path("docs").glob("*.md"))


# ---- the machine ----


def machine(setup: Setup) -> dict[str, Case]:
    """What it is, and some of its limits."""
    device, size = setup.device, 256 if setup.tiny else 8192

    def versions() -> Iterable[Finding]:
        yield "python, torch", f"{sys.version.split()[0]}, {torch.__version__}", "pinned: 2.13.0"
        for name in ("numpy", "triton", "transformers", "torchao"):
            try:
                yield name, str(__import__(name).__version__), ""
            except Exception as error:
                yield name, "missing", str(error)[:100]
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            yield (
                "GPU",
                properties.name,
                f"{properties.total_memory / 1e9:.0f} GB, {properties.multi_processor_count} SMs",
            )
            yield "cuDNN, NCCL", f"{torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}", ""

    def limits() -> Iterable[Finding]:
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        yield "product of bf16, TFLOP/s", 2 * size**3 / seconds_of(lambda: a @ a, device, brief=setup.tiny) / 1e12, ""
        b = torch.randn(size, size, device=device)
        yield "copy, TB/s", 2 * b.nbytes / seconds_of(b.clone, device, brief=setup.tiny) / 1e12, "read and written"
        one = torch.ones((), device=device)
        yield "a small operation, µs", 1e6 * seconds_of(lambda: one.add_(1), device, brief=setup.tiny, n=500), ""

    return {"versions": versions, "limits": limits}


# ---- the suite's tests ----


def tests(setup: Setup) -> dict[str, Case]:
    """The tests of tests/test_gpu.py, a row each."""

    def run() -> Iterable[Finding]:
        workers = "4" if setup.device.type == "cuda" else "0"
        command = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=short", f"-n{workers}", "tests/test_gpu.py"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        timer = threading.Timer(max(5.0, setup.until - time.time() - 1), process.kill)
        timer.daemon = True  # else this process would wait for it
        timer.start()
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := re.search(r"(PASSED|SKIPPED) tests/\S+::(.+)|tests/\S+?::(.+) (PASSED|SKIPPED)", line):
                yield (found[2] or found[3]).strip(), (found[1] or found[4]).lower(), ""
            elif found := re.match(r"(FAILED|ERROR) tests/\S+?::(.+?) - (.*)", line):
                yield found[2], found[1].lower(), found[3][:300]
        yield "pytest's status", process.wait(), "-9: no time was left"
        timer.cancel()

    return {"tests/test_gpu.py": run}


# ---- the losses of the first steps ----


def losses(setup: Setup) -> dict[str, Case]:
    """The model and recipe of params.yaml on characters; each way to run them next to a CPU in float32."""
    vocab_size, train_ids, _ = characters(setup)
    n_steps = 3 if setup.tiny else 20 if setup.quick else 50
    config = model_config(vocab_size=vocab_size, block_size=32 if setup.tiny else 128)
    batches = Batches(train_ids, seq_len=config.block_size, batch_size=8, seed=1)

    def run(device: torch.device, way: str, changes: dict[str, Any], fields: dict[str, Any]) -> list[float]:
        learner = build_learner(
            dataclasses.replace(config, **fields), device, way, **{"batch_size": 8, "max_steps": 200} | changes
        )
        found = []
        for step in range(n_steps):
            found.append(learner.learn(step, torch.from_numpy(batches.batch_at(step)).to(device))[0])
        return torch.stack(found).tolist()

    @functools.cache
    def of_cpu(**changes: Any) -> list[float]:
        return run(torch.device("cpu"), "eager", {"precision": "fp32", **changes}, {})

    def case(way: str, **changes: Any) -> Case:
        fields: dict[str, Any] = {
            name: changes.pop(name) for name in ("dropout", "n_kv_head", "window") if name in changes
        }

        def measure() -> Iterable[Finding]:
            ours = run(setup.device, way, changes, fields)
            yield (
                f"loss of steps 1, 10 and {n_steps}",
                ", ".join(f"{ours[i]:.4f}" for i in (0, min(9, n_steps - 1), -1)),
                "",
            )
            if not fields:
                kept = {key: value for key, value in changes.items() if key != "precision"}
                apart = [abs(a - b) for a, b in zip(ours, of_cpu(**kept), strict=True)]
                yield "furthest from a CPU in fp32", max(apart), f"in the mean {sum(apart) / len(apart):.2g}"
            yield "the same bits again", str(run(setup.device, way, changes, fields) == ours), ""

        return measure

    cases: dict[str, Case] = {"a CPU, fp32": lambda: [("loss of the last step", of_cpu()[-1], "")]}
    cases |= {
        "fp32": case("eager", precision="fp32"),
        "bf16, compiled": case("compiled", precision="bf16"),
        "bf16, graphs": case("graphs", precision="bf16"),
        "bf16": case("eager", precision="bf16"),
        "tf32": case("eager", precision="tf32"),
    }
    if not setup.quick:
        cases |= {
            "fp16": case("eager", precision="fp16"),
            "fp32, compiled": case("compiled", precision="fp32"),
            "tf32, graphs": case("graphs", precision="tf32"),
            "fp16, compiled": case("compiled", precision="fp16"),
            "bf16, dropout, graphs": case("graphs", precision="bf16", dropout=0.2),
            "bf16, windows, GQA, compiled": case("compiled", precision="bf16", window=100, n_kv_head=2),
            "bf16, adamw, graphs": case("graphs", precision="bf16", optimizer="adamw"),
            "bf16, adamw8bit": case("eager", precision="bf16", optimizer="adamw8bit"),
            "bf16, lion, graphs": case("graphs", precision="bf16", optimizer="lion", lr=1e-3, embedding_lr=None),
        }
    return cases


# ---- tokens a second of training ----

TRAINED: dict[str, tuple[dict[str, int], int, int]] = {  # sizes, vocab_size, batch_size
    "0.8M": (training.SIZES["small"][0], training.CHARS, 12),
    "10.7M": (training.SIZES["large"][0], training.CHARS, 64),
    "124M": (training.SIZES["gpt2"][0], 50_304, 32),
}
TINY_SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16}


def speed(size: str, setup: Setup) -> dict[str, Case]:
    """Ours in several ways, transformers and a plain GPT, with fused AdamW and clipped gradients; ours with Muon."""
    sizes, vocab_size, batch_size = TRAINED[size]
    if setup.tiny:
        sizes, vocab_size, batch_size = TINY_SIZES, 96, 2
    config = model_config(vocab_size=vocab_size, **(training.GPT2 | sizes))
    device = setup.device
    adamw: dict[str, Any] = training.ADAMW | {"batch_size": batch_size, "precision": "bf16", "max_steps": 10**6}
    per_step = batch_size * config.block_size

    def timed(build: Callable[[], training.Step], batch: Callable[[int], Tensor] | None = None) -> Iterable[Finding]:
        ids = torch.randint(vocab_size, (batch_size, config.block_size + 1), device=device)
        began, number = time.perf_counter(), iter(range(10**9))
        step = build()

        def one() -> None:
            n = next(number)
            step(n, ids if batch is None else batch(n))

        for _ in range(1 if setup.tiny else 4):
            one()
        wait_for(device)
        ready = time.perf_counter() - began
        once = seconds_of(one, device, brief=True)
        n = max(1, min(50, int(0.3 / once)))
        each = seconds_of(one, device, brief=setup.brief, n=n, rounds=3 if setup.quick else 5)
        tokens = per_step / each
        note = f"{1e3 * each:.2f} ms a step, ready after {ready:.1f} s, {peak_gb()}"
        yield "tokens a second", tokens, note
        yield "share of the peak", f"{tokens * flops_per_token(config) / PEAK:.1%}", ""
        if size == "124M":
            yield "times llm.c's published speed", tokens / MARK, ""

    def ours(way: str, **changes: Any) -> Case:
        return lambda: timed(lambda: build_learner(config, device, way, **(adamw | changes)).learn)

    def theirs(build: Callable[..., training.Step], *, compiled: bool) -> Case:
        case = training.Case(config, batch_size, "bf16", device)
        return lambda: timed(lambda: build(case, compiled=compiled and device.type == "cuda"))

    def from_host() -> Iterable[Finding]:
        tokens = np.random.default_rng(0).integers(vocab_size, size=per_step * 50 + 1).astype(np.uint16)
        batches = Batches(tokens, seq_len=config.block_size, batch_size=batch_size, seed=1)

        def batch(number: int) -> torch.Tensor:
            return on_device(batches.batch_at(number), device)

        yield from timed(lambda: build_learner(config, device, "graphs", **adamw).learn, batch)

    def not_repeatable() -> Iterable[Finding]:
        with mock.patch("tinygpt.train.learner.repeatable", lambda device: nullcontext()):
            yield from ours("graphs")()

    cases: dict[str, Case] = {"ours, graphs": ours("graphs"), "ours, graphs, Muon": ours("graphs", optimizer="muon")}
    if not setup.quick or size == "124M":
        cases |= {"plain, compiled": theirs(training.plain, compiled=True)}
    if not setup.quick:
        cases |= {
            "transformers, compiled": theirs(training.transformers_gpt2, compiled=True),
            "ours, compiled": ours("compiled"),
            "ours": ours("eager"),
            "plain": theirs(training.plain, compiled=False),
            "transformers": theirs(training.transformers_gpt2, compiled=False),
            "ours, graphs, batches from the host": from_host,
        }
    cases["ours, graphs, other bits each time"] = not_repeatable
    return cases


# ---- which kernel attention takes ----

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "learned positions": {"position": "learned"},
    "GQA": {"n_kv_head": 2},
    "window": {"window": 256},
    "window, GQA": {"window": 256, "n_kv_head": 2},
    "explicit": {"attention": "explicit"},
}


def attention(setup: Setup) -> dict[str, Case]:
    """Forward and backward pass of two layers, context 1024, eager."""
    device, brief = setup.device, setup.tiny or setup.quick
    sizes = {"n_layer": 2, "n_head": 8, "n_embd": 512, "block_size": 1024}
    if setup.tiny:
        sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 256}
    ids = torch.zeros(1 if setup.tiny else 8, sizes["block_size"] + 1, dtype=torch.long, device=device)

    def case(precision: str, changes: dict[str, Any]) -> Case:
        def measure() -> Iterable[Finding]:
            config = model_config(vocab_size=256, **({"tie_weights": True, "qk_norm": False} | sizes | changes))
            loss = Loss(GPT(config).to(device), precision)
            loss(ids).backward()
            peak_gb()
            with torch.profiler.profile() as profiled:
                loss(ids).backward()
                wait_for(device)
            names = {event.name for event in profiled.events() if event.name.startswith("aten::_scaled_dot_product")}
            found = {name.removeprefix("aten::_scaled_dot_product_").removesuffix("_backward") for name in names}
            milliseconds = 1e3 * seconds_of(lambda: loss(ids).backward(), device, brief=brief, n=5, rounds=5)
            yield "kernel", ", ".join(sorted(found)) or "none", f"{milliseconds:.2f} ms a pass, {peak_gb()}"

        return measure

    precisions = ("bf16",) if setup.tiny else ("bf16", "fp32")
    return {f"{name}, {p}": case(p, changes) for p in precisions for name, changes in SWITCHES.items()}


# ---- memory ----

CAP = 16 * 2**30  # bytes of GPU memory that the part may take, so that others can run


def memory(setup: Setup) -> dict[str, Case]:
    """Memory of GPT-2 124M, within 16 GiB."""
    device = setup.device
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(device).total_memory)
    sizes, vocab_size, _ = TRAINED["124M"]
    config = model_config(
        vocab_size=96 if setup.tiny else vocab_size, **(training.GPT2 | (TINY_SIZES if setup.tiny else sizes))
    )

    def learner(batch_size: int, **changes: Any) -> Learner:
        return build_learner(config, device, batch_size=batch_size, precision="bf16", optimizer="adamw", **changes)

    def tokens(n: int) -> Tensor:
        return torch.zeros(n, config.block_size + 1, dtype=torch.long, device=device)

    def auto() -> Iterable[Finding]:
        one = learner(8 if setup.tiny else 512, micro_batch_size="auto")
        one.micro_batch_size = find_micro_batch_size(one)
        yield "micro_batch_size", one.micro_batch_size, "of 512 sequences"
        one.learn(0, tokens(2 * one.micro_batch_size))
        yield "a step in it", "done", peak_gb()

    def too_large() -> Iterable[Finding]:
        if device.type != "cuda":
            return
        one = learner(512)
        try:
            with out_of_memory(LESS_MEMORY):
                one.learn(0, tokens(512))
            yield "says", "nothing", "it fits"
        except UserError as error:
            yield "says", str(error), ""
        one.model.zero_grad()
        del one
        torch.cuda.empty_cache()
        learner(1).learn(0, tokens(1))
        yield "a smaller step after it", "done", peak_gb()

    def counted() -> Iterable[Finding]:
        n = 1 if setup.tiny else 4
        one = learner(n)
        expected = memory_of(config, one.params, one.runtime, n, device).training
        peak_gb()
        for step in range(2):
            one.learn(step, tokens(n))
        yield "GB of a step, counted before", expected / 1e9, peak_gb()

    return {"micro_batch_size auto": auto, "out of memory": too_large, "counted": counted}


# ---- tiny Shakespeare ----

Recipe = tuple[dict[str, Any], dict[str, Any]]  # of the model and of training
SHAKESPEARE: dict[str, Recipe] = {
    "4.9M, batch 64, 500 steps": ({"n_embd": 256}, {"batch_size": 64, "max_steps": 500, "lr": 0.008}),
    "10.7M, batch 64, 400 steps": ({"n_embd": 384}, {"batch_size": 64, "max_steps": 400, "lr": 0.006}),
    "4.9M, batch 32, 900 steps": ({"n_embd": 256}, {"batch_size": 32, "max_steps": 900, "lr": 0.007}),
    "10.7M, batch 32, 700 steps": ({"n_embd": 384}, {"batch_size": 32, "max_steps": 700, "lr": 0.005}),
    "10.7M, batch 64, 600 steps": ({"n_embd": 384}, {"batch_size": 64, "max_steps": 600, "lr": 0.006}),
}


def shakespeare(setup: Setup) -> dict[str, Case]:
    """Seconds of training and evaluation until the loss over the whole validation split is GOAL, without compiling."""
    vocab_size, train_ids, val_ids = characters(setup)
    device, block_size = setup.device, 16 if setup.tiny else 256
    rows = validation_sequences(val_ids, block_size, 10**9)[: 4 if setup.tiny else None]

    def read(batch_size: int) -> Batches:
        return Batches(train_ids, seq_len=block_size, batch_size=batch_size, seed=1)

    def until_goal(
        step: Callable[[int], object],
        evaluate: Callable[[], float],
        n_steps: int,
        due: Callable[[int], bool],
        *,
        stop: bool,
    ) -> Iterable[Finding]:
        reached, best, began = None, float("inf"), time.perf_counter()
        for number in range(n_steps):
            step(number)
            if due(number + 1):
                loss = evaluate()
                best = min(best, loss)
                if loss <= GOAL and reached is None:
                    reached = time.perf_counter() - began, number + 1
                    if stop:
                        break
        seconds = time.perf_counter() - began
        at = f"at step {reached[1]}" if reached else f"not reached in {n_steps} steps"
        yield f"seconds to {GOAL}", reached[0] if reached else "–", at
        yield "loss, last and lowest", f"{loss:.4f}, {best:.4f}", f"{seconds:.2f} s in all"

    def ours(fields: dict[str, Any], changes: dict[str, Any]) -> Case:
        def measure() -> Iterable[Finding]:
            if setup.tiny:
                sizes: dict[str, Any] = TINY_SIZES
            else:
                sizes = {"n_layer": 6, "n_head": 6, "block_size": block_size} | fields
                sizes["n_head"] = 4 if fields["n_embd"] == 256 else 6
            config = model_config(vocab_size=vocab_size, **({"dropout": 0.2} | sizes))
            n_steps = 3 if setup.brief else changes["max_steps"]
            began = time.perf_counter()
            learner = build_learner(config, device, "graphs", **(changes | {"warmup_steps": 30}))
            set_first_weights(learner.model, train_ids)
            first = {name: tensor.detach().clone() for name, tensor in learner.model.state_dict().items()}
            batches, at_device = read(changes["batch_size"]), torch.from_numpy(rows).to(device)

            def evaluate() -> float:
                with learner.evaluated() as model:
                    return learner.loss_of(model, at_device)

            def batch(number: int) -> torch.Tensor:
                return on_device(batches.batch_at(number), device)

            for number in range(4):
                learner.learn(number, batch(number))
            evaluate()
            learner.model.load_state_dict(first)
            for optimizer in learner.optimizers:
                optimizer.state.clear()
            yield "seconds to be ready", time.perf_counter() - began, "compiled and recorded"
            every = max(1, n_steps // 20)
            yield from until_goal(
                lambda number: learner.learn(number, batch(number)),
                evaluate,
                n_steps,
                lambda done: done == n_steps or (done > n_steps // 2 and done % every == 0),
                stop=False,
            )

        return measure

    def plain() -> Iterable[Finding]:
        sizes = TINY_SIZES if setup.tiny else training.SIZES["large"][0]
        config = model_config(vocab_size=vocab_size, **(training.GPT2 | sizes))
        model = PlainGPT(config).to(device)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
            elif isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
        loss = torch.compile(loss_of, dynamic=False) if device.type == "cuda" else loss_of
        batches, n_steps = read(2 if setup.tiny else 64), 3 if setup.brief else 2500

        def step(number: int) -> None:
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (number + 1) / 100)  # its cosine hardly falls so early
            with autocast("bf16", device):
                value = loss(model, on_device(batches.batch_at(number), device))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def evaluate() -> float:
            model.eval()
            with autocast("bf16", device):
                found = validation_loss(model, rows)
            model.train()
            return found

        began = time.perf_counter()
        for number in range(3):
            step(number)
        wait_for(device)
        yield "seconds to be ready", time.perf_counter() - began, "compiled"
        yield from until_goal(step, evaluate, n_steps, lambda done: done % 125 == 0 or done == n_steps, stop=True)

    found = {name: ours(*recipe) for name, recipe in SHAKESPEARE.items()}
    return dict(list(found.items())[: 2 if setup.quick or setup.tiny else None]) | {"plain, nanoGPT's recipe": plain}


# ---- decoding ----


def decode(setup: Setup) -> dict[str, Case]:
    """Tokens per second after prompts of 64, the likeliest each time, for 124 M random weights; all rows together."""
    device, n_new = setup.device, 4 if setup.brief else 16 if setup.quick else 48
    sizes = TINY_SIZES if setup.tiny else {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
    vocab_size, n_prompt = (96, 6) if setup.tiny else (50_304, 64)
    config = model_config(vocab_size=vocab_size, **({"tie_weights": True, "qk_norm": False} | sizes))

    def prompts(n_row: int) -> list[list[int]]:
        return torch.randint(vocab_size, (n_row, n_prompt), generator=torch.Generator().manual_seed(0)).tolist()

    def model(kind: str) -> GPT:
        one = GPT(config).eval().to(device)
        if kind in ("int8", "int4"):
            quantize(one, kind)
        return one.to(torch.bfloat16) if kind == "bf16" else one

    def run(one: GPT, n_row: int) -> tuple[float, float]:
        wait_for(device)
        began = time.perf_counter()
        decoder = Decoder(one, prompts(n_row))
        ids = decoder.logits.argmax(-1).tolist()
        first = time.perf_counter() - began
        for _ in range(n_new):
            decoder.step(ids)
            ids = decoder.logits.argmax(-1).tolist()
        return first, (time.perf_counter() - began - first) / n_new

    def ours(kind: str, n_rows: tuple[int, ...], *, compiled: bool = False) -> Case:
        def measure() -> Iterable[Finding]:
            one, began = model(kind), time.perf_counter()
            if compiled and device.type == "cuda":
                with newer_compile():
                    compile_step(one, n_row=max(n_rows))
            ready = time.perf_counter() - began
            for n_row in n_rows:
                run(one, n_row)
                found = [run(one, n_row) for _ in range(1 if setup.brief else 3)]
                each = median(second for _, second in found)
                note = f"first token {1e3 * median(first for first, _ in found):.1f} ms, {peak_gb()}"
                yield (
                    f"batch {n_row}, tokens a second",
                    n_row / each,
                    note + (f", ready after {ready:.0f} s" if compiled else ""),
                )

        return measure

    def transformers(kind: str, n_rows: tuple[int, ...]) -> Case:
        def measure() -> Iterable[Finding]:
            from transformers import LlamaConfig, LlamaForCausalLM

            theirs = LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.n_embd,
                intermediate_size=config.n_hidden,
                num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head,
                max_position_embeddings=config.block_size,
                tie_word_embeddings=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            one: Any = LlamaForCausalLM(theirs).eval().to(device, torch.bfloat16 if kind == "bf16" else torch.float32)

            def generate(ids: Tensor, n: int) -> float:
                wait_for(device)
                began = time.perf_counter()
                one.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, min_new_tokens=n
                )
                wait_for(device)
                return time.perf_counter() - began

            for n_row in n_rows:
                ids = torch.tensor(prompts(n_row), device=device)
                generate(ids, 2)
                found = [(generate(ids, 1 + n_new) - generate(ids, 1)) / n_new for _ in range(1 if setup.brief else 3)]
                yield f"batch {n_row}, tokens a second", n_row / median(found), peak_gb()

        return measure

    all_rows = (1, 2) if setup.tiny else (1, 32, 256)
    some = (all_rows[0], all_rows[-1])
    cases: dict[str, Case] = {
        "f32": ours("f32", all_rows),
        "bf16": ours("bf16", all_rows),
        "int8": ours("int8", some),
        "int4": ours("int4", some),
        "f32, compiled": ours("f32", (1,), compiled=True),
    }
    if not setup.quick:
        cases |= {
            "transformers, f32": transformers("f32", all_rows),
            "transformers, bf16": transformers("bf16", all_rows),
            "bf16, compiled": ours("bf16", (1,), compiled=True),
            "int8, compiled": ours("int8", (1,), compiled=True),
            "f32, compiled for 256 rows": ours("f32", all_rows, compiled=True),
        }
    return {name: case for name, case in cases.items() if not setup.warm or "compiled" in name}


def newer_compile() -> Any:
    """A context in which an older PyTorch accepts 2.13's arguments; there, two models may share compiled entries."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return nullcontext()
    old = torch.compile
    return mock.patch("torch.compile", lambda *args, isolate_recompiles=False, **kwargs: old(*args, **kwargs))


# ---- processes ----


def processes(setup: Setup) -> dict[str, Case]:
    """NCCL, with one process, and with two on one GPU if it lets them."""

    def together(n: int) -> Case:
        def measure() -> Iterable[Finding]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            context = torch.multiprocessing.get_context("spawn")
            queue = context.Queue()
            workers = [context.Process(target=work, args=(rank, n, port, queue), daemon=True) for rank in range(n)]
            for worker in workers:
                worker.start()
            deadline = min(time.time() + 45, setup.until - 2)
            while time.time() < deadline and any(worker.is_alive() for worker in workers) and queue.empty():
                time.sleep(0.1)
            yield from queue.get(timeout=2) if not queue.empty() else [("ended", "without a word", "")]
            for worker in workers:
                worker.kill()

        return measure

    return {"one process": together(1), "two processes on one GPU": together(1 if setup.tiny else 2)}


def work(rank: int, n: int, port: str, queue: Any) -> None:
    """One of the processes: check sums, and compare both ways to share a model with a model alone."""
    from datetime import timedelta

    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(n)}
    found: list[Finding] = []
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=30))
        total = torch.ones(4, device=device)
        dist.all_reduce(total)
        found.append(("sum of ones", total[0].item(), f"of {n}"))
        config = model_config(vocab_size=256, n_layer=2, n_head=4, n_embd=64, block_size=64)
        ids = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
        alone = gradients_of(GPT(config, generator=torch.Generator().manual_seed(1)).to(device), ids, None)
        for parallel in (Replicas(), SplitWeights()):
            model = GPT(config, generator=torch.Generator().manual_seed(1)).to(device)
            shared = gradients_of(model, ids, parallel)
            apart = max((a - b).abs().max().item() for a, b in zip(alone, shared, strict=True))
            found.append((f"{type(parallel).__name__}, furthest gradient", apart, f"{n} processes with the same batch"))
        dist.destroy_process_group()
    except Exception as error:
        found.append(("failed", type(error).__name__, " ".join(str(error).split())[:300]))
    if rank == 0 or found[-1][0] == "failed":
        queue.put(found)
        time.sleep(1)


def gradients_of(model: GPT, ids: Tensor, parallel: Replicas | SplitWeights | None) -> list[Tensor]:
    """The whole gradients of one batch."""
    from tinygpt.train.parallel import whole

    if parallel is not None:
        parallel.split(model)
    loss: torch.nn.Module = Loss(model, "fp32")
    if parallel is not None:
        loss = parallel.wrap(loss, ids)
    loss(ids).backward()
    return [whole(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


PARTS: dict[str, Part] = {
    "machine": Part(machine, timed=True, weight=0.3),
    "tests": Part(tests),
    "losses": Part(losses),
    "attention": Part(attention, timed=True, weight=0.8),
    "memory": Part(memory),
    "processes": Part(processes),
    "speed 124M": Part(functools.partial(speed, "124M"), timed=True, compiles=True, weight=3),
    "speed 10.7M": Part(functools.partial(speed, "10.7M"), timed=True, compiles=True, weight=2),
    "shakespeare": Part(shakespeare, timed=True, compiles=True, weight=3),
    "decode": Part(decode, timed=True, compiles=True, weight=2),
    "speed 0.8M": Part(functools.partial(speed, "0.8M"), timed=True, compiles=True, weight=1.5),
}
