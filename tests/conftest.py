"""What many tests share: small configs and models, one small tokenizer, trained projects, and how tests are run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; set before torch is imported
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # set in containers: each process would compile our modules again

import tinygpt  # noqa: F401  # before torch, too: sets how threads wait

# isort: split

import io
import random
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from project import commit, made_once, make_project, run_stages, set_params, succeed
from xdist.scheduler import LoadScopeScheduling

from tinygpt.cli.main import main
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.runtime import RuntimeParams
from tinygpt.threads import n_cpu
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.bpe import train_bpe

settings.register_profile("shared machine", deadline=None)  # there, any example can take a second
settings.load_profile("shared machine")

FUZZ = float(os.environ.get("TINYGPT_FUZZ", "1"))  # multiplies the number of damaged inputs

SMALL = {
    "vocab_size": 300,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": None,
    "n_embd": 32,
    "head_dim": None,
    "n_hidden": None,
    "block_size": 64,
    "position": "rope",
    "rope_theta": 10000.0,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "mlp": "swiglu",
    "parallel_block": False,
    "window": None,
    "full_every": None,
    "bias": "none",
    "qk_norm": False,
    "tie_weights": True,
    "dropout": 0.0,
    "attention": "sdpa",
}

# Characters that pretokenizers disagree about: white space of all kinds, contractions, joiners, marks, numbers.
TRICKY = st.text(
    st.one_of(
        st.sampled_from(list(" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\u200d\ufeff'’stvremld.,!?½Ⅷ٣१")),
        st.characters(codec="utf-8", max_codepoint=0xFFFF),
        st.sampled_from(list("aAé中я😀👩🏽\u0301\x00")),
    ),
    max_size=80,
)

RUNTIME = RuntimeParams(
    device="cpu",
    n_thread=1,
    n_process=1,
    parallel="ddp",
    n_worker=1,
    engine="process",
    ray_address=None,
    micro_batch_size=None,
    gradient_checkpointing=False,
    compile=False,
    cuda_graphs=False,
    log_every=5,
    log_to=(),
)

# One config of each exported family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "n_kv_head": 2},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all"},
}


def tiny_config(**changes: Any) -> GPTConfig:
    """A config of two layers, 32 wide, with some fields changed."""
    return GPTConfig(**{**SMALL, **changes})


def tiny_model(*, seed: int = 0, **changes: Any) -> GPT:
    """A model with random weights, in eval mode.

    The weights are ten times as large as at the start of training, so that logits differ enough to compare.
    """
    model = GPT(tiny_config(**changes), generator=torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.1, generator=generator)  # zero at the start of training
            elif parameter.ndim > 1:
                parameter *= 10
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def random_ids(*shape: int, vocab_size: int = 300, seed: int = 0) -> torch.Tensor:
    """Ids drawn uniformly, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def prose(n_words: int, *, seed: int = 0) -> str:
    """Made-up sentences over some hundred words, a few of them not English."""
    syllables = "ba co di fu ga ho in ka lo me no pa re so ti un va we yo ze".split()
    words = [a + b + c for a in syllables for b in syllables[::3] for c in ("", "n", "st")]
    words += "the then there other this that thing return returns error list file model".split() * 20
    words += "naïve façade über 中文 данные 42 3.14 don't it's we'll".split() * 5
    rng = random.Random(seed)
    return " ".join(rng.choice(words) + rng.choice(["", "", "", ",", ".\n"]) for _ in range(n_words))


def save_cycle(folder: Path) -> str:
    """Write a folder with a model of bytes that repeats "é😀中" after a line end; return that text."""
    text, tokenizer = "é😀中", Tokenizer.from_merges([])
    model = tiny_model(vocab_size=tokenizer.vocab_size, tie_weights=False)
    ids = tokenizer.encode("\n" + text)
    with torch.no_grad():
        for layer in model.blocks:
            layer.attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for i, next_id in zip(ids, [*ids[1:], ids[1]], strict=True):  # the embedding of a token decides the next one
            model.lm_head.weight[next_id] += 100 * model.norm(model.tok_emb.weight[i])
    save_model(folder, model.config, model_tensors(model))
    tokenizer.save(folder)
    return text


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """300 tokens learned from `prose`."""
    return train_bpe([prose(2000)], 300, special_tokens=("<|user|>",))


STEPS = {"train.max_steps": 200, "train.save_every": 7, "train.eval_every": 60}  # some seconds of training


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    """A project after `dvc repro` has run all stages, with everything committed."""

    def make(folder: Path) -> None:
        make_project(folder)
        run_stages("code download clean base train_tokenizer encode train evaluate plot export report", folder)
        succeed("dvc commit -fq", folder)
        commit(folder, "first run")

    return made_once(tmp_path_factory.getbasetemp(), "done", make)


@pytest.fixture(scope="session")
def undisturbed(done, tmp_path_factory) -> Path:
    """The same project after a longer training without interruption."""

    def make(folder: Path) -> None:
        shutil.copytree(done, folder, symlinks=True)
        set_params(folder, STEPS)
        run_stages("train", folder)

    return made_once(tmp_path_factory.getbasetemp(), "undisturbed", make)


@pytest.fixture
def project(done, tmp_path) -> Path:
    """A copy of the project, cache and all."""
    return Path(shutil.copytree(done, tmp_path / "project", symlinks=True))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the machine code of torch.compile for all tests, and for the next run."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.cache.mkdir("inductor"))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would be processes, which take five seconds to start
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # trying each instruction set of the CPU takes eight seconds


TOGETHER = {  # tests that need an order, or share a slow fixture: they run in one worker, and first
    "tests/test_pipeline.py::TestTheStory": "pipeline",
    "tests/test_experiments.py": "experiments",
    "tests/test_distributed.py::test_processes_train_the_model": "distributed",
    "tests/test_compiled.py": "compiler",
    "tests/test_made_up_parts.py": "compiler",
    "tests/test_generate_command.py::test_compiled_steps": "compiler",
    "tests/test_generate_command.py::test_without_a_compiler": "compiler",
    "tests/test_train.py::test_a_compiled_step": "compiler",
    "tests/test_serve.py::test_a_signal": "compiler",
    "tests/test_speculation_options.py": "compiler",
    "tests/test_serve.py": "server",
    "tests/test_chat.py": "server",
    "tests/test_resume.py": "killed",
    "tests/test_kills.py": "killed",
    "tests/test_fuzz.py": "killed",
    "tests/test_beam.py": "beams",
    "tests/test_notebooks.py::test_a_notebook_runs": "notebooks",
    "tests/test_live.py": "browser",
    "tests/test_page.py": "browser",
    "tests/test_playground.py": "browser",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: one more than there are CPUs, as tests wait for other processes, unless the user sets a number."""
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", n_cpu() + 1))


class Scheduling(LoadScopeScheduling):
    """Sends tests that belong together to one worker.  (pytest 9.2 drops the marks that xdist 3.8 has for this.)"""

    def _split_scope(self, nodeid: str) -> str:
        return next((scope for name, scope in TOGETHER.items() if nodeid.startswith(name)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Use our scheduling."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no worker is left alone with one at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which step of a story failed."""
    report = yield
    if report.failed and item.get_closest_marker("story"):
        item.parent.failed_step = item.name
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the steps after a failed one."""
    if failed := getattr(item.parent, "failed_step", None):
        pytest.skip(f"the step before failed: {failed}")


@pytest.fixture(autouse=True)
def interrupts() -> Generator[None]:
    """Leave SIGINT as it was before the test: after a command that failed early, it would end the process at once."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Done(NamedTuple):
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Done]:
    """Run `python -m tinygpt ...` in this process, where slow imports are done already."""

    def run(*args: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr("sys.argv", ["tinygpt", *map(str, args)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code: Any = 0
        handler = signal.getsignal(signal.SIGINT)
        try:
            main()
        except SystemExit as left:
            code = left.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, handler)  # a chat ignores SIGINT when it leaves
        return Done(1 if isinstance(code, str) else code or 0, *capsys.readouterr())

    return run
