"""Training: batches, schedules, optimizer, and a loop that resumes bit for bit."""

import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import RUNTIME, random_ids, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import in_child

from tinygpt.cli.runs import find_runs
from tinygpt.errors import Stopped, UserError
from tinygpt.model import layers
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import model_tensors
from tinygpt.report.training import described, publish
from tinygpt.run import checkpoint
from tinygpt.run.checkpoint import Checkpoints, fingerprint
from tinygpt.run.processes import Interrupts
from tinygpt.run.run import Run
from tinygpt.train import trainer as trainer_module
from tinygpt.train.batches import Batches, validation_sequences
from tinygpt.train.config import ContextWarmup, EMAParams, LoRAParams, TrainParams
from tinygpt.train.learner import Learner, part_norms
from tinygpt.train.loss import next_token_loss
from tinygpt.train.optim import OPTIMIZERS, OptimizerKind
from tinygpt.train.parallel import ALONE
from tinygpt.train.schedules import SCHEDULES, dropout_frac_at, lr_frac_at
from tinygpt.train.trainer import Trainer

PARAMS = TrainParams(
    seed=1,
    init_from="scratch",
    lora=None,
    max_steps=10,
    batch_size=4,
    context_warmup=None,
    shuffle_documents=False,
    optimizer="adamw",
    lr=3e-3,
    embedding_lr=None,
    head_lr=None,
    vector_lr=None,
    min_lr_frac=0.1,
    warmup_steps=2,
    schedule="cosine",
    decay_frac=0.4,
    weight_decay=0.1,
    embedding_weight_decay=0.0,
    betas=(0.9, 0.99),
    momentum=0.95,
    grad_clip=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
    ema=None,
    patience=None,
    anneal_dropout=False,
    precision="auto",
    eval_every=4,
    eval_tokens=500,
    save_every=3,
    sample_tokens=0,
)


def tokens(n: int = 2000) -> np.ndarray:
    """Ids with something to learn: each is one of four that may follow the one before.  It ends as it begins."""
    rng = np.random.default_rng(0)
    ids = [0]
    for step in rng.integers(1, 5, n - 2):
        ids.append(int(ids[-1] * 3 + step) % 300)
    return np.array([*ids, 0], np.uint16)


@pytest.fixture(autouse=True)
def runs_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def make_learner(*, params=PARAMS, runtime=RUNTIME, base=None, world=ALONE, **config) -> Learner:
    model = GPT(tiny_config(**config), generator=torch.Generator().manual_seed(params.seed))
    if base is not None:
        model.load_state_dict(base, strict=False)
    return Learner(model, params, runtime, device=torch.device("cpu"), world=world)


def make_trainer(**kwargs) -> Trainer:
    return Trainer(make_learner(**kwargs), train_tokens=tokens(), val_tokens=tokens(800))


def fit(trainer: Trainer, name: str = "run", **kwargs):
    with Run(name, trainer.learner.config, trainer.params, trainer.runtime, **kwargs) as run:
        return trainer.fit(run)


def train(name: str = "run", **kwargs):
    return fit(make_trainer(**kwargs), name)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_that_will_not_fit_into_memory_is_reported_before_the_first():
    with pytest.raises(UserError, match=r"a step will not fit into memory: lower runtime\.micro_batch_size"):
        train(params=dataclasses.replace(PARAMS, batch_size=2**32))


# ---- batches ----


@given(n=st.integers(20, 300), seq_len=st.integers(1, 19), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_an_epoch_has_each_token_once_except_for_less_than_a_sequence(n, seq_len, batch_size, seed):
    ring = np.arange(n).astype(np.uint16)
    batches = Batches(np.r_[ring, ring[:1]], seq_len=seq_len, batch_size=batch_size, seed=seed)
    n_steps = -(-batches.per_epoch // batch_size)
    rows = np.concatenate([batches.batch_at(step) for step in range(n_steps)])[: batches.per_epoch]
    counts = Counter(rows[:, 1:].flatten().tolist())
    assert set(counts.values()) == {1}
    assert n - len(counts) < seq_len
    assert ((rows[:, 1:] - rows[:, :-1]) % n == 1).all()  # each target follows its token


def test_the_batch_of_a_step_does_not_depend_on_the_steps_before():
    once = Batches(tokens(), seq_len=16, batch_size=4, seed=1)
    forward = [once.batch_at(step) for step in range(80)]
    for step in (79, 3, 40):
        assert (Batches(tokens(), seq_len=16, batch_size=4, seed=1).batch_at(step) == forward[step]).all()
    other = Batches(tokens(), seq_len=16, batch_size=4, seed=2).batch_at(0)
    assert (other != forward[0]).any()
    assert (forward[0] != forward[once.per_epoch // 4 + 1]).any()  # each epoch has its own order


# ---- schedules ----


@given(
    max_steps=st.integers(1, 500),
    warmup_share=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
)
def test_learning_rate_is_never_zero_peaks_after_the_warmup_and_ends_at_the_minimum(max_steps, warmup_share, schedule):
    warmup = int(max_steps * warmup_share)
    params = dataclasses.replace(PARAMS, max_steps=max_steps, warmup_steps=warmup, schedule=schedule)
    lrs = [lr_frac_at(step, params) for step in range(max_steps)]
    assert 0 < lrs[0] <= 1
    assert lrs[warmup] == pytest.approx(1)
    assert all(a < b for a, b in pairwise(lrs[: warmup + 1]))
    after = lrs[warmup:]
    assert all(a >= b for a, b in pairwise(after))
    if schedule != "constant" and len(after) > 1:
        assert after[-1] == pytest.approx(params.min_lr_frac)


@pytest.mark.parametrize(
    ("schedule", "shares"),  # after 20, 60, 80 and 100 percent of the way from the warmup to the end
    [
        ("cosine", [0.9045, 0.3455, 0.0955, 0]),
        ("linear", [0.8, 0.4, 0.2, 0]),
        ("wsd", [1, 1, 0.5, 0]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_each_schedule_has_its_shape(schedule, shares):
    changes = {"schedule": schedule, "min_lr_frac": 0.2, "decay_frac": 0.4}
    params = dataclasses.replace(PARAMS, max_steps=14, warmup_steps=3, **changes)
    assert [lr_frac_at(step, params) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    found = [lr_frac_at(step, params) for step in (5, 9, 11, 13)]
    assert found == pytest.approx([0.2 + 0.8 * share for share in shares], abs=1e-4)


# ---- dropout ----


def test_anneal_dropout_lets_dropout_fall_to_zero_over_the_run():
    annealed = dataclasses.replace(PARAMS, anneal_dropout=True)
    assert [dropout_frac_at(step, annealed) for step in (0, 5, 9)] == pytest.approx([1, 0.5, 0.1])
    assert dropout_frac_at(9, PARAMS) == 1
    trainer = make_trainer(params=annealed, dropout=0.4)
    fit(trainer)
    shares = {round(module.p, 9) for module in trainer.learner.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares == {0.04}
    assert not same(train("annealed", params=annealed, dropout=0.4).last, train("constant", dropout=0.4).last)


# ---- the loop ----


def test_training_lowers_the_loss_and_keeps_the_best_and_the_last_weights():
    trained = train(params=dataclasses.replace(PARAMS, max_steps=40))
    rows = trained.state.rows
    assert rows[-1]["train_loss"] < rows[1]["train_loss"] - 0.3
    assert trained.state.best_val_loss == min(row["val_loss"] for row in rows if row["val_loss"] is not None)
    assert [row["step"] for row in rows] == list(range(41))
    assert [row["step"] for row in rows if row["val_loss"] is not None] == list(range(0, 41, 4))
    assert trained.state.best_step == 40
    assert same(trained.best, trained.last)


GROWING = {"lr": 0.5, "optimizer": "lion", "warmup_steps": 0, "schedule": "constant"}  # the loss grows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": EMAParams(decay=0.5, start=2)},
        {"lora": LoRAParams(rank=2, alpha=8.0, dropout=0.0, targets=("q_proj",))},
    ],
    ids=["all", "ema", "lora"],
)
def test_training_from_a_base_never_gives_worse_weights_than_the_base(changes, tmp_path):
    base = train("base", params=dataclasses.replace(PARAMS, max_steps=40)).best
    params = dataclasses.replace(PARAMS, init_from="base", **GROWING, **changes)
    trainer = make_trainer(params=params, base=base)
    trained = fit(trainer)
    evaluated = [row["val_loss"] for row in trained.state.rows if row["val_loss"] is not None]
    assert trained.state.best_step == 0 and evaluated[0] == min(evaluated) < evaluated[-1]
    assert same(trained.best, base) and not same(trained.last, base)
    made_from = {"tokenizer": "0", "base": None}
    report = publish(trained, trainer, tmp_path / "model", tmp_path / "reports", made_from=made_from)
    assert (report["best_step"], report["first_val_loss"]) == (0, report["val_loss"])
    assert "at step 0: no step improved it, so the weights that training started from" in described(
        report, tmp_path / "model"
    )
    assert (tmp_path / "reports/train.csv").read_text().splitlines()[1] == f"0,,{report['val_loss']:.8g},,"


def test_patience_counts_from_a_base_that_is_the_best():
    base = train("base", params=dataclasses.replace(PARAMS, max_steps=40)).best
    params = dataclasses.replace(PARAMS, **GROWING, init_from="base", max_steps=60, eval_every=2, patience=3)
    assert fit(make_trainer(params=params, base=base)).state.step == 6


def test_a_validation_loss_that_is_not_a_number_is_reported_with_its_step():
    wild = {"lr": 1e30, "max_steps": 1, "eval_every": 1, "warmup_steps": 0, "sample_tokens": 5}
    with pytest.raises(UserError, match=r"validation loss nan at step 1: lower train\.lr"):
        train(params=dataclasses.replace(PARAMS, **wild), tie_weights=False)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in make_learner().model.state_dict().items()}
    with pytest.raises(UserError, match=r"validation loss nan before the first step: use another base"):
        train("broken", base=broken)


def test_norms_of_parts_make_up_the_norm_of_the_whole():
    model = tiny_model(tie_weights=False)
    next_token_loss(model.hidden(random_ids(2, 9)), model.lm_head.weight, random_ids(2, 9, seed=1)).backward()
    norms = part_norms(model)
    assert list(norms) == ["tok_emb", "block_0", "block_1", "norm", "lm_head"]
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(torch.stack([*norms.values()]).norm(), whole)
    rows = train().state.norms
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert all(row["block_1"] > 0 for row in rows)


RECOMPUTED = dataclasses.replace(RUNTIME, gradient_checkpointing=True, micro_batch_size=2)
ALL_ON = {
    "optimizer": "muon",
    "ema": EMAParams(decay=0.7, start=3),
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "context_warmup": ContextWarmup(start=8, steps=8),
    "shuffle_documents": True,
}


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({}, {"tie_weights": False, "bias": "all"}),
        ({"anneal_dropout": True}, {"dropout": 0.2}),
        (ALL_ON, {"dropout": 0.2}),
        ({"optimizer": "lion"}, {}),
        ({"precision": "fp16"}, {}),
        (ALL_ON, {"dropout": 0.2, "runtime": RECOMPUTED}),
    ],
    ids=["plain", "untied", "dropout", "all on", "lion", "fp16", "recomputed"],
)
def test_a_run_cut_anywhere_ends_with_the_same_bits(changes, config, monkeypatch):
    cut_and_resume(monkeypatch, params=dataclasses.replace(PARAMS, **changes), **config)


@pytest.mark.parametrize(
    ("registry", "field", "entry"),
    [
        (OPTIMIZERS, "optimizer", OptimizerKind(lambda groups, params: [torch.optim.NAdam(groups)], (8, 8))),
        (SCHEDULES, "schedule", lambda progress, decay_frac: (1 - progress) ** 2),
        (SCHEDULES, "schedule", lambda progress, decay_frac: min(1.0, (1 - progress) / decay_frac) ** 2),
    ],
    ids=["optimizer", "schedule", "schedule at the end"],
)
def test_an_optimizer_or_a_schedule_is_one_entry(registry, field, entry, monkeypatch):
    monkeypatch.setitem(registry, "made up", entry)
    params = dataclasses.replace(PARAMS, **{field: "made up"})
    assert not same(cut_and_resume(monkeypatch, params=params).last, train("another").last)


def cut_and_resume(monkeypatch, **config):
    """Train once undisturbed, and once killed four times: both end with the same bits.  Returns the latter."""
    undisturbed = train("undisturbed", **config)
    cuts = iter([2, 5, 6, 9])

    class Killed(BaseException):
        pass

    original = Trainer._train_step

    def step_or_die(trainer: Trainer, step: int, **how: bool) -> None:
        if step == step_or_die.cut:
            step_or_die.cut = next(cuts, None)
            raise Killed
        original(trainer, step, **how)

    step_or_die.cut = next(cuts)
    monkeypatch.setattr(Trainer, "_train_step", step_or_die)
    for _ in range(4):
        with pytest.raises(Killed):
            train("cut", **config)
    resumed = train("cut", **config)
    assert same(resumed.last, undisturbed.last)
    assert same(resumed.best, undisturbed.best)
    measured = {"seconds": 0.0, "peak_mem_gib": 0.0}
    assert dataclasses.replace(resumed.state, **measured) == dataclasses.replace(undisturbed.state, **measured)
    return resumed


def test_the_average_of_the_weights_is_evaluated_and_published(monkeypatch):
    seen = []
    original = Trainer._train_step

    def step(trainer: Trainer, number: int, **how: bool) -> None:
        original(trainer, number, **how)
        seen.append(trainer.learner.model.norm.weight.detach().clone())

    monkeypatch.setattr(Trainer, "_train_step", step)
    plain = train("plain")
    del seen[:]
    params = dataclasses.replace(PARAMS, ema=EMAParams(decay=0.75, start=6))
    averaged = train("averaged", params=params)
    average = seen[5]
    for weight in seen[6:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(averaged.last["norm.weight"], average)
    torch.testing.assert_close(seen[-1], plain.last["norm.weight"])  # the average does not change the training
    rows = averaged.state.rows
    assert rows[3]["val_loss"] == plain.state.rows[3]["val_loss"]  # before averaging begins
    assert rows[-1]["val_loss"] != plain.state.rows[-1]["val_loss"]
    assert rows[-1]["train_loss"] == plain.state.rows[-1]["train_loss"]
    trainer = make_trainer()
    trainer.learner.model.load_state_dict(averaged.last, strict=False)
    with trainer.learner.evaluated() as model:
        val_loss = trainer.learner.loss_of(model, torch.from_numpy(trainer.val_batch))
    assert val_loss == pytest.approx(rows[-1]["val_loss"], abs=1e-6)


def test_a_run_without_a_lower_loss_ends_when_patience_does(monkeypatch):
    params = dataclasses.replace(PARAMS, lr=0.3, warmup_steps=0, max_steps=60, eval_every=2, patience=3)
    trained = train(params=params)
    assert trained.state.step == trained.state.best_step + 6 < 60
    monkeypatch.setattr(Trainer, "_train_step", lambda *_, **__: pytest.fail("it trained again"))
    assert train(params=params).state == trained.state


def test_a_finished_run_is_returned_again_without_a_step(monkeypatch):
    first = train()
    monkeypatch.setattr(Trainer, "_train_step", lambda *_, **__: pytest.fail("it trained again"))
    again = train()
    assert same(first.last, again.last)
    assert same(first.best, again.best)
    assert again.state == first.state


@pytest.mark.parametrize("part", ["weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_checkpoint_makes_way_for_the_one_before(part, damage, tmp_path, capsys):
    undisturbed = train("undisturbed")
    train("damaged")
    newest = sorted((tmp_path / "runs/damaged").glob("step-*"))[-1]
    path = newest / part
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw if damage == "flipped" else raw[: len(raw) // 2])
    resumed = train("damaged")
    assert "using the one before it" in capsys.readouterr().out
    assert same(resumed.last, undisturbed.last)
    assert same(resumed.best, undisturbed.best)


def test_where_no_checkpoint_is_whole_the_run_says_so_and_begins_again(tmp_path, capsys):
    undisturbed = train("undisturbed")
    train("damaged")
    for state in (tmp_path / "runs/damaged").glob("step-*/state.json"):
        state.write_text("{")
    resumed = train("damaged")
    told = capsys.readouterr().out
    assert told.count("is damaged") == 2 and "runs/damaged is intact: starting from the first step" in told
    assert same(resumed.last, undisturbed.last)


def test_a_damaged_checkpoint_is_skipped_or_loads_as_it_was(tmp_path, capsys):
    train("a" * 16)
    with Checkpoints("a" * 16) as checkpoints:
        checkpoints.note(max_steps=10, finished=False)
    runs_folder, rng = tmp_path / "runs", random.Random(0)
    newest = sorted(checkpoints.folder.glob("step-*"))[-1]
    for file in [newest / "state.json"] * 60 + [newest.parent / "run.json"] * 30 + [newest / "best.safetensors"] * 10:
        sound = file.read_bytes()
        raw = bytearray(sound)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        odd = rng.choice(
            [b"", b"{}", b'{"state": {}}', b'{"max_steps": "9", "finished": 1}', raw[: rng.randrange(len(raw))]]
        )
        file.write_bytes(rng.choice([raw, odd]))
        (listed,) = find_runs(runs_folder)
        with Checkpoints("a" * 16) as checkpoints:
            state, _ = checkpoints.load_latest()
        told = capsys.readouterr().out.count("is damaged")
        assert (state.step, told) == ((10, 0) if file.name == "run.json" else (9, 1))
        assert listed.state == ("interrupted" if file.name == "best.safetensors" else "damaged")
        file.write_bytes(sound)
    assert find_runs(runs_folder)[0].state == "interrupted"


def test_a_checkpoint_without_read_permission_is_not_skipped(tmp_path):
    train()
    newest = sorted((tmp_path / "runs/run").glob("step-*"))[-1]
    (newest / "state.json").chmod(0)
    (newest / "weights.safetensors").chmod(0)

    def go_on() -> None:
        if not os.getuid():
            for folder in (each for each in (tmp_path, *tmp_path.parents) if each.stat().st_mode & 0o777 == 0o700):
                folder.chmod(0o755)
            (tmp_path / "runs/run/lock").chmod(0o666)
            os.setuid(65534)  # root may read everything
        with Checkpoints("run") as checkpoints, pytest.raises(PermissionError, match=r"state\.json"):
            checkpoints.load_latest()

    assert in_child(go_on) == 0


def test_two_checkpoints_are_kept_and_half_written_ones_are_cleared_away(tmp_path):
    train()
    folder = tmp_path / "runs/run"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-0000009", "step-0000010"]
    shutil.copytree(folder / "step-0000010", folder / "step-0000011.partial")
    assert train().state.step == 10
    assert not (folder / "step-0000011.partial").exists()


def test_a_line_of_the_log_between_two_rows_of_the_curve_has_the_means_since_the_last(capsys, monkeypatch):
    params, runtime = dataclasses.replace(PARAMS, eval_every=100), dataclasses.replace(RUNTIME, log_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "MAX_ROWS", 3)  # a row every fourth step, as in a run of thousands
        train(params=params, runtime=runtime)
    losses = [row["train_loss"] for row in train("every", params=params).state.rows[1:]]
    expected = {3: losses[:3], 6: losses[4:6], 9: losses[8:9], 10: losses[8:]}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")][1 : 1 + len(expected)]
    for (step, part), line in zip(expected.items(), lines, strict=True):
        assert line.startswith(f"step {step:>6} of 10  train loss {np.mean(part):.4f}")
        assert len(line) <= 80


def test_a_second_trainer_of_the_same_run_is_refused():
    with (
        Checkpoints("run"),
        pytest.raises(UserError, match=r"another trainer is writing .*runs/run"),
        Checkpoints("run"),
    ):
        pass


def test_micro_batches_of_any_size_give_the_same_model_up_to_rounding():
    params = dataclasses.replace(PARAMS, max_steps=5, context_warmup=ContextWarmup(start=16, steps=4))
    whole = train("whole", params=params)
    for size in (1, 3):
        parts = train(f"parts{size}", params=params, runtime=dataclasses.replace(RUNTIME, micro_batch_size=size))
        for name in whole.last:
            torch.testing.assert_close(parts.last[name], whole.last[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step_up_to_rounding():
    params = dataclasses.replace(PARAMS, max_steps=5, batch_size=2, label_smoothing=0.1)
    runtime = dataclasses.replace(RUNTIME, micro_batch_size=1)
    eager = train("eager", params=params, runtime=runtime, n_layer=1)
    compiled = train("compiled", params=params, runtime=dataclasses.replace(runtime, compile=True), n_layer=1)
    for name in eager.last:
        torch.testing.assert_close(compiled.last[name], eager.last[name], atol=2e-4, rtol=1e-3)
    assert compiled.state.best_val_loss == pytest.approx(eager.state.best_val_loss, abs=1e-4)


def compile_by(backend: str | Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile modules without making machine code, which takes ten seconds for each size."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, *, dynamic, mode: compiled(module, backend=backend, dynamic=dynamic)
    )


def test_a_step_that_cannot_be_compiled_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    compile_by(broken, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be compiled \(.*No working C\+\+ compiler.*without runtime.compile"):
        train(runtime=dataclasses.replace(RUNTIME, compile=True), n_layer=1)


def test_a_compiled_step_with_adapters_is_the_same_step(monkeypatch):
    compile_by("eager", monkeypatch)
    lora = LoRAParams(rank=2, alpha=8.0, dropout=0.0, targets=None)
    params = dataclasses.replace(PARAMS, max_steps=3, init_from="base", lora=lora)
    base = {name: tensor.detach() for name, tensor in GPT(tiny_config(tie_weights=False)).state_dict().items()}
    eager, compiled = (
        train(name, params=params, base=base, runtime=dataclasses.replace(RUNTIME, compile=on), tie_weights=False)
        for name, on in (("eager", False), ("compiled", True))
    )
    assert len(eager.trained) == 2 * (2 * 7 + 2)
    assert same(eager.trained, compiled.trained)


def test_each_length_of_a_context_warmup_is_compiled_once(monkeypatch):
    compile_by("eager", monkeypatch)
    monkeypatch.setattr(layers, "FIRST_ROOM", 16)  # rope's tables grow, outside the compiled code
    counters = torch._dynamo.utils.counters
    counters.clear()
    params = dataclasses.replace(PARAMS, context_warmup=ContextWarmup(start=1, steps=9))
    eager, compiled = (
        train(name, params=params, runtime=dataclasses.replace(RUNTIME, compile=name == "compiled"))
        for name in ("eager", "compiled")
    )
    assert counters["stats"]["unique_graphs"] == 7  # 1, 2, 4 … 64 tokens
    assert same(compiled.last, eager.last)


@pytest.mark.parametrize(("lr", "grad_clip"), [(1e30, 1e30)])
def test_a_loss_that_is_not_a_number_stops_the_run_with_its_step_and_keeps_the_last_good_checkpoint(
    lr, grad_clip, tmp_path
):
    params = dataclasses.replace(PARAMS, lr=lr, grad_clip=grad_clip, save_every=1)
    with pytest.raises(UserError, match=r"loss .* at step \d+: lower train.lr"):
        train(params=params)
    with Checkpoints("run") as checkpoints:
        state, tensors = checkpoints.load_latest()
    assert state.step >= 1
    assert all(tensor.isfinite().all() for tensor in tensors["weights"].values())


def test_a_thread_may_train():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result().last


def test_a_request_to_stop_saves_and_says_so(monkeypatch):
    asked = iter([False, False, False, False, True])

    def requested(interrupts: Interrupts) -> int:
        if next(asked):
            interrupts.signal = 15
        return interrupts.signal or 0

    monkeypatch.setattr(Interrupts, "requested", requested)
    with pytest.raises(Stopped, match="stopped after step") as stopped:
        train()
    assert stopped.value.signal == 15


def test_validation_sequences_are_spread_over_the_split():
    def starts(n_tokens: int, limit: int) -> list[int]:
        rows = validation_sequences(np.arange(n_tokens, dtype=np.uint16), 8, limit)
        assert rows.tolist() == [list(range(start, start + 9)) for start in rows[:, 0]]
        return rows[:, 0].tolist()

    assert starts(30, 1000) == [0, 8, 16]  # all, and the rest is too short
    assert starts(25, 24) == [0, 8, 16]
    assert starts(8 * 100 + 1, 32) == [0, 200, 400, 600]
    assert starts(8 * 10 + 1, 24) == [0, 24, 48]
    assert starts(8 * 11 + 1, 32) == [0, 16, 40, 64]
    assert starts(30, 17) == [0, 8]
    assert starts(30, 1) == starts(9, 1000) == [0]


def test_a_fingerprint_names_the_params_the_data_and_the_code(monkeypatch):
    from tinygpt.tokens import SplitMeta, TokensMeta

    split = SplitMeta(tokens=1, documents=1, bytes=1, sha256="a")
    meta = TokensMeta(dtype="<u2", vocab_size=300, eos_id=0, tokenizer_sha256="t", train=split, val=split, test=split)
    base = fingerprint(tiny_config(), PARAMS, meta)
    others = [
        fingerprint(tiny_config(n_layer=3), PARAMS, meta),
        fingerprint(tiny_config(), dataclasses.replace(PARAMS, lr=1e-4), meta),
        fingerprint(tiny_config(), PARAMS, dataclasses.replace(meta, train=dataclasses.replace(split, sha256="b"))),
        fingerprint(tiny_config(), PARAMS, dataclasses.replace(meta, val=dataclasses.replace(split, sha256="b"))),
        fingerprint(tiny_config(), PARAMS, dataclasses.replace(meta, tokenizer_sha256="u")),
    ]
    assert base == fingerprint(tiny_config(), PARAMS, meta)
    others.append(fingerprint(tiny_config(), PARAMS, meta, "sha256 of a base"))
    packed = dataclasses.replace(PARAMS, optimizer="adamw8bit")
    others.append(fingerprint(tiny_config(), packed, meta))
    monkeypatch.setattr(checkpoint, "version_of", lambda package: f"another {package}")
    others.append(fingerprint(tiny_config(), packed, meta))
    assert base == fingerprint(tiny_config(), PARAMS, meta)  # it does not need the package
    for changed in (None, "tinygpt.train.first_weights", "tinygpt.train.trainer"):
        monkeypatch.setattr(checkpoint, "code_of", lambda module, changed=changed: module == changed)
        others.append(fingerprint(tiny_config(), PARAMS, meta))
    assert len({base, *others}) == 12


def test_publishing_writes_the_same_bytes_twice(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(Run, "sample", lambda run, model: "a sample")
    params = dataclasses.replace(PARAMS, sample_tokens=5)
    files = []
    for name in "ab":
        trainer = make_trainer(params=params)
        report = publish(
            fit(trainer, name),
            trainer,
            tmp_path / name / "model",
            tmp_path / name / "reports",
            made_from={"tokenizer": "0", "base": None},
        )
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file() and path.name != "train.json")
        files.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths})
    assert files[0] == files[1]
    assert sorted(files[0]) == [
        "model/config.json",
        "model/last.safetensors",
        "model/model.safetensors",
        "model/training.json",
        "reports/train.csv",
        "reports/train_norms.csv",
        "reports/train_samples.md",
    ]
    header, *rows = files[0]["reports/train.csv"].decode().splitlines()
    assert header == "step,train_loss,val_loss,lr,grad_norm"
    assert len(rows) == 1 + PARAMS.max_steps
    assert files[0]["reports/train_samples.md"].decode().count("a sample") == 4
    assert json.loads((tmp_path / "a/reports/train.json").read_text())["tokens"] == 10 * 4 * 64
    assert json.loads(files[0]["model/config.json"])["tokenizer_sha256"] == "0"
    assert report["epochs"] == pytest.approx(10 * 4 * 64 / 1999)


def test_tokens_are_counted_and_a_context_warmup_does_not_change_their_number(tmp_path, monkeypatch):
    params = dataclasses.replace(PARAMS, context_warmup=ContextWarmup(start=16, steps=6))
    seen, original = [], Learner.learn

    def learn(learner: Learner, step: int, ids: torch.Tensor, **how: bool) -> torch.Tensor:
        seen.append(ids[:, 1:].numel())
        return original(learner, step, ids, **how)

    monkeypatch.setattr(Learner, "learn", learn)
    trainer = make_trainer(params=params)
    report = publish(
        fit(trainer), trainer, tmp_path / "model", tmp_path / "reports", made_from={"tokenizer": "0", "base": None}
    )
    assert seen == [256] * 10
    assert report["tokens"] == 256 * 10
    assert report["epochs"] == report["tokens"] / 1999
    assert report["tokens_per_s"] == report["tokens"] / report["seconds"]


def test_weights_of_the_model_are_what_is_saved():
    trained = train()
    trainer, again = make_trainer(), make_trainer()
    with Run("run", tiny_config(), PARAMS, RUNTIME) as run, run.resumed(again.learner):
        assert same(model_tensors(again.learner.model), trained.last)
    assert not same(model_tensors(trainer.learner.model), trained.last)
