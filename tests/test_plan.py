"""`plan`: its scaling law on the measured runs, properties of its search, the command from a text to params.yaml."""

import csv
import dataclasses
import math
import re
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from project import SMALL, corpus, run_stages, set_params

from benchmarks.scaling_fit import fit, forecasts, read_rows, said, size_of, text_of
from quickstart import ROOT
from tinygpt.cli import plan as command
from tinygpt.cli.main import build_parser
from tinygpt.cli.project import apply_values
from tinygpt.corpus.folders import split_file, text_line
from tinygpt.errors import UserError
from tinygpt.model.config import ModelParams
from tinygpt.params import check_params, load_params
from tinygpt.plan import measure
from tinygpt.plan import text as text_module
from tinygpt.plan.measure import Speeds, between, flops_per_token
from tinygpt.plan.plan import Planner
from tinygpt.plan.recipe import LAW, LAYERS, Recipe, Size, spread
from tinygpt.plan.text import FARTHEST, NEAR, Prober, Text, Trend, copied_share, measure_text, sample_of
from tinygpt.report.config import EvaluateParams
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.train.config import TrainParams

PARAMS = ROOT / "params.yaml"
MODEL, TRAIN = load_params(ModelParams, TrainParams, path=PARAMS)
SPEEDS = Speeds({64: 2e10, 128: 4e10, 256: 8e10}, {64: 1e-8, 256: 1e-8}, 0.0)  # operations, seconds
TEXT = Text(2_000_000, 100_000, {512: 2.0, 1024: 2.4, 2048: 2.8, 4096: 3.2}, 0.1, {1024: 1.3, 4096: 1.35})
TRENDS = {"by_weights": Trend(1.3e5, 9e5, 1.03), "by_tokens": Trend(8e5, 3e6, 0.95)}


def planner(**changes: float) -> Planner:
    text = dataclasses.replace(TEXT, **TRENDS | changes)
    return Planner(text=text, speeds=SPEEDS, model=MODEL, train=TRAIN, others_s=30.0)


# ---- the law ----


def test_the_constants_are_those_of_the_runs():
    rows = read_rows()
    assert len(rows) >= 45
    law, difficulties = fit(rows)
    errors = []
    for row in rows:
        errors.append(said(row, law, difficulties) / float(row["val_bpb"]) - 1)
        assert LAW.loss(size_of(row)) == pytest.approx(law.loss(size_of(row)), rel=0.005)
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.02


SIZE = Size(
    n_weights=1e6,
    n_all_weights=1.2e6,
    n_tokens=1e6,
    n_unique=1e6,
    batch_tokens=1024,
    bytes_per_token=2.5,
    copied=0.1,
)
sizes = st.builds(
    Size,
    n_weights=st.floats(1e5, 1e9),
    n_all_weights=st.floats(1e5, 1e9),
    n_tokens=st.floats(1e5, 1e10),
    n_unique=st.floats(1e5, 1e10),
    batch_tokens=st.floats(512, 1e6),
    bytes_per_token=st.floats(1, 6),
    copied=st.floats(0, 1),
)


@given(sizes, st.floats(1, 100))
def test_more_text_and_smaller_batches_never_harm(size, times):
    more = dataclasses.replace(size, n_unique=size.n_unique * times)
    assert LAW.loss(more) <= LAW.loss(size) * (1 + 1e-12)
    smaller = dataclasses.replace(size, batch_tokens=size.batch_tokens / times)
    assert LAW.loss(smaller) <= LAW.loss(size)


def test_what_is_seen_again_counts_less_and_so_do_weights_that_a_text_says_little_about():
    size = SIZE
    again, anew = dataclasses.replace(size, n_tokens=4e6), dataclasses.replace(size, n_tokens=4e6, n_unique=4e6)
    assert LAW.loss(anew) < LAW.loss(again) < LAW.loss(size)
    embedded = dataclasses.replace(size, n_all_weights=4e6)
    assert LAW.loss(embedded) > 1.02 * LAW.loss(size)
    of_a_large_text = dataclasses.replace(embedded, n_unique=1e12)
    assert LAW.loss(of_a_large_text) == pytest.approx(LAW.loss(dataclasses.replace(size, n_unique=1e12)), rel=1e-3)


def test_long_tokens_help_to_learn_a_text_but_not_to_copy():
    short = dataclasses.replace(SIZE, n_unique=4e6, bytes_per_token=2.0, copied=0.0)
    long = dataclasses.replace(short, bytes_per_token=4.0, n_unique=2e6)  # of the same text, and as many are seen
    assert LAW.loss(long) < 0.97 * LAW.loss(short)
    copies = [LAW.loss(dataclasses.replace(size, copied=1.0)) for size in (short, long)]
    assert copies[0] == pytest.approx(copies[1])


# ---- the text ----


@given(st.floats(1e3, 1e9), st.floats(1.1, 100), st.floats(0.5, 2))
def test_a_trend_passes_through_both_of_its_models_and_ends_as_far_again(first, times, change):
    trend = Trend(first, first * times, change)
    assert trend.at(first) == pytest.approx(1)
    assert trend.at(first * times) == pytest.approx(change)
    assert trend.at(first * times**FARTHEST) == pytest.approx(change**FARTHEST)
    assert trend.at(first * times**5) == pytest.approx(change**FARTHEST)


def test_what_a_text_says_of_its_small_models_is_what_they_had(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PROBE_STEPS", 12)
    bpb, probe = {}, Prober.probe

    def noted(self, **size):
        found = probe(self, **size)
        bpb[self.vocab_size, *size.items()] = found
        return found

    monkeypatch.setattr(Prober, "probe", noted)
    write_split(tmp_path, [corpus()] * 2)
    write_split(tmp_path, [corpus()[:20_000]], "val")
    tokenizer, runtime = load_params(TokenizerParams, RuntimeParams, path=PARAMS)
    measured = measure_text(tmp_path, tokenizer, MODEL, TRAIN, runtime, torch.device("cpu"))
    assert len(bpb) == 3  # the small one, a wider one, a longer one; the text is too small for more vocabularies
    for (vocab_size, *_), found in bpb.items():
        assert measured.loss(found.size, vocab_size) == pytest.approx(found.bpb)
    assert measured.by_weights.change != 1 != measured.by_tokens.change


@pytest.mark.parametrize(("n", "share"), [(200, 188 / 400), (NEAR, 188 / (NEAR + 200)), (NEAR + 1, 0.0)])
@pytest.mark.parametrize("n_part", [100, 1000])
def test_what_repeats_the_text_shortly_before_is_copied(n_part, n, share):
    letters = np.random.default_rng(1).integers(97, 123, n_part * n).astype(np.uint8).tobytes().decode()
    parts = [letters[start : start + n] for start in range(0, len(letters), n)]
    assert copied_share([part + part[:200] for part in parts]) == pytest.approx(share, abs=0.02)


def test_no_text_has_no_copies():
    assert copied_share([]) == copied_share(["abc"]) == 0


@pytest.mark.parametrize("n_document", [1, 7, 3000])
def test_a_sample_has_as_much_of_every_part_of_a_text(n_document, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "SAMPLE", 3_000_000)
    words = [f"{i % 10}" * 6 + " " for i in range(1_400_000)]
    words.sort()  # ten parts, each of a digit of its own
    texts = [
        "".join(words[i * len(words) // n_document : (i + 1) * len(words) // n_document]) for i in range(n_document)
    ]
    write_split(tmp_path, texts)
    texts, n_bytes = sample_of(split_file(tmp_path, "train"))
    found = "".join(texts)
    assert n_bytes == pytest.approx(9_800_000, rel=0.01)
    assert len(found) == pytest.approx(text_module.SAMPLE, rel=0.02)
    for digit in "0123456789":
        assert found.count(digit) == pytest.approx(text_module.SAMPLE * 6 / 70, rel=0.15)


def test_a_sample_of_a_small_text_is_all_of_it(tmp_path):
    write_split(tmp_path, ["a b", "ü" * 100_000])
    assert sample_of(split_file(tmp_path, "train")) == (["a b", "ü" * 100_000], 200_003)


def write_split(folder, texts, split="train"):
    (folder / f"{split}.jsonl").write_text("".join(map(text_line, texts)))


# ---- the search ----


@settings(max_examples=15, deadline=None)
@given(st.floats(2, 600), st.floats(1.1, 4), st.floats(2e5, 1e8))
def test_more_time_or_more_text_is_never_worse(minutes, times, n_bytes):
    some = planner(train_bytes=n_bytes)
    plan = some.best(60 * minutes)
    assert plan.seconds <= 60 * minutes * (1 + 1e-9)
    assert some.best(60 * minutes * times).bpb <= plan.bpb * 1.004  # for so little, the shorter plan wins
    assert planner(train_bytes=n_bytes * times).best(60 * minutes).bpb <= plan.bpb * 1.004


@pytest.mark.parametrize("minutes", [3, 30])
def test_the_time_for_a_loss_is_the_loss_of_that_time(minutes):
    plan = planner().best(60 * minutes)
    found = planner().reach(plan.bpb)
    assert found.bpb <= plan.bpb
    assert found.seconds <= 60 * minutes * 1.06


def test_a_time_that_is_too_short_is_answered_with_the_least_that_is_not():
    with pytest.raises(UserError, match=r"--minutes 0.6 is too short: .* need --minutes ([\d.]+)$") as caught:
        planner().best(36)
    least = 60 * float(str(caught.value).split()[-1])
    assert planner().best(least).seconds <= least
    with pytest.raises(UserError):
        planner().best(least / 1.05 - 6)  # the answer was rounded up to a tenth of a minute


def test_processes_share_each_batch():
    assert planner().best(600).recipe.batch_size < 32
    assert dataclasses.replace(planner(), n_process=32).best(600).recipe.batch_size == 32


def test_the_steps_take_the_time():
    plan = planner(train_bytes=1e9).best(600)
    step = SPEEDS.step(plan.config, plan.recipe.batch_size)
    assert plan.train_s * 0.85 < plan.recipe.max_steps * step <= plan.train_s
    operations = flops_per_token(plan.config) * plan.recipe.batch_size * plan.recipe.block_size
    assert step > operations / max(SPEEDS.operations.values())


def test_a_step_takes_its_operations_and_its_weights_at_speeds_between_those_measured():
    widths = (32, 64, 128, 256, 512)
    assert [between({64: 2e10, 256: 2e12}, n) for n in widths] == pytest.approx([2e10, 2e10, 2e11, 2e12, 2e12])
    config = Recipe(n_embd=128, vocab_size=2048, max_steps=1000, epochs=1).config(MODEL)
    seconds = flops_per_token(config) * 16 * config.block_size / 4e10 + 1e-8 * config.n_weights(2048)
    assert SPEEDS.step(config, 16) == pytest.approx(seconds)


def test_a_small_text_gets_a_smaller_model_and_says_what_would_help():
    small, large = (planner(train_bytes=n).best(3600) for n in (200_000, 100_000_000))
    assert small.config.n_weights(0) < large.config.n_weights(0)
    assert small.bpb > large.bpb
    assert small.seconds < 1800 < large.seconds  # more time would bring next to nothing
    assert re.search(
        r"four times as much text would bring .*, four times as much time", planner(train_bytes=2e5).lever(small)
    )
    assert "as much time would bring" in planner(train_bytes=1e8).lever(planner(train_bytes=1e8).best(120))
    unread = planner(train_bytes=1e8).best(1200)
    assert unread.recipe.epochs < 0.5
    assert "four times as much text 0.00" in planner(train_bytes=1e8).lever(unread)


@pytest.mark.parametrize("n_embd", LAYERS)
@pytest.mark.parametrize(("max_steps", "epochs"), [(50, 0.1), (333, 3.0), (100_000, 40.0)])
def test_every_recipe_fits_params_yaml(n_embd, max_steps, epochs, tmp_path):
    shutil.copy(PARAMS, tmp_path)
    recipe = Recipe(n_embd=n_embd, vocab_size=2048, max_steps=max_steps, epochs=epochs)
    apply_values(tmp_path / "params.yaml", recipe.values())
    groups = check_params(tmp_path / "params.yaml")
    assert groups["train"] == recipe.training(TRAIN)
    assert groups["model"].n_weights(2048) == recipe.config(MODEL).n_weights(2048)


def test_at_the_default_width_the_recipe_trains_as_params_yaml_does():
    recipe = Recipe(n_embd=MODEL.n_embd, vocab_size=2048, max_steps=TRAIN.max_steps, epochs=1.0)
    assert dataclasses.replace(recipe.training(TRAIN), eval_every=200, save_every=200) == TRAIN
    wider = Recipe(n_embd=4 * MODEL.n_embd, vocab_size=2048, max_steps=9000, epochs=1.0).train()
    assert (wider["lr"], wider["embedding_lr"], wider["warmup_steps"]) == (TRAIN.lr / 2, TRAIN.embedding_lr / 2, 90)


# ---- the command ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with its text, on which little is measured."""
    shutil.copy(PARAMS, tmp_path)
    (tmp_path / "corpus.txt").write_text(corpus(), encoding="utf-8")
    set_params(
        tmp_path, {key: value for key, value in SMALL.items() if key.startswith(("download", "clean", "runtime"))}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_module, "PROBE_STEPS", 12)
    monkeypatch.setattr(measure, "MOST_S", 0.0)
    monkeypatch.setattr(measure, "MEASURE_S", 0.01)
    monkeypatch.setattr(time, "process_time", lambda: 2.0)  # as if this process had just started
    return tmp_path


def plan(arguments: str) -> None:
    command.plan(build_parser().parse_args(["plan", *arguments.split()]))


def test_it_says_what_it_would_train_and_writes_it(folder, capsys):
    run_stages("download clean", folder)
    before = (folder / "params.yaml").read_text()
    plan("--minutes 60")
    said = capsys.readouterr().out
    rows = [line[:12].strip() for line in said.splitlines()]
    assert [row for row in rows if row not in ("half", "double")] == (
        ["model", "training", "rates", "expected", "time", "to spare", "memory", "files", "lever"]
    )
    assert (folder / "params.yaml").read_text() == before
    plan("--minutes 60 --write")
    written = capsys.readouterr().out
    assert "values changed in params.yaml; `dvc repro` uses them" in written
    model, train = load_params(ModelParams, TrainParams)
    assert f"{model.n_layer} layers of {model.n_embd}" in written
    assert f"{train.max_steps:,} steps of {train.batch_size} sequences" in written
    assert f"embedding_lr {train.embedding_lr:g}, dropout {model.dropout:g}" in written
    assert model.dropout > 0  # the text is so small that it is seen often
    assert [line.partition("#")[2] for line in (folder / "params.yaml").read_text().splitlines()] == [
        line.partition("#")[2] for line in before.splitlines()
    ]


def test_an_evaluation_with_more_context_than_the_planned_model_has_is_reset(folder, capsys):
    set_params(folder, {"model.block_size": 512, "evaluate.context": 400, "evaluate.stride": 8})
    run_stages("download clean", folder)
    plan("--minutes 60 --write")
    evaluate, model = load_params(EvaluateParams, ModelParams)
    assert (evaluate.context, evaluate.stride, model.block_size) == (None, 8, 256)


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_another_kind_of_tokenizer_stays(kind, folder, capsys):
    set_params(folder, {"tokenizer.kind": kind})
    run_stages("download clean", folder)
    plan("--bpb 5 --write")
    said = capsys.readouterr().out
    assert "expected" in said and "tokenizer." not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"give either --minutes 30, how long it may take, or --bpb 1.9"),
        ("--minutes 3 --bpb 2", r"give either --minutes 30, how long it may take, or --bpb 1.9"),
        ("--minutes 0", r"--minutes=0 must be above 0"),
        ("--minutes nan", r"--minutes=nan must be a finite number"),
        ("--minutes -5", r"--minutes=-5 must be above 0"),
        ("--bpb inf", r"--bpb=inf must be a finite number"),
        ("--minutes 0.01", r"--minutes 0.01 is too short: the other stages alone need \d+ s"),
        (
            "--bpb 0.01",
            r"--bpb 0.01 of validation text is out of reach: a month .*as much text would bring",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, message, folder):
    if "0.01" in arguments:
        run_stages("download clean", folder)
    with pytest.raises(UserError, match=message) as caught:
        plan(arguments)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_missing_or_too_small_is_said(folder):
    with pytest.raises(UserError, match=r"data/clean/train.jsonl"):
        plan("--minutes 5")
    (folder / "corpus.txt").write_text(
        "\n\n".join(f"This is paragraph number {i}, and it is short." * 3 for i in range(12))
    )
    run_stages("download clean", folder)
    with pytest.raises(UserError, match=r"the text gives .* tokens to learn from and .* to measure on.*use more text"):
        plan("--minutes 5")


def test_processes_that_can_share_no_batch_are_refused(folder):
    set_params(folder, {"runtime.n_process": 3, "train.batch_size": 6})
    with pytest.raises(UserError, match=r"runtime.n_process=3 must be 1, 2, 4, … or 128: a plan's"):
        plan("--minutes 5")


def test_a_base_is_refused(folder):
    set_params(folder, {"train.init_from": "base"})
    with pytest.raises(UserError, match=r"plan is for training from scratch"):
        plan("--minutes 5")


def test_the_range_covers_what_was_seen():
    rows = read_rows()
    copied = {text_of(row): float(row["copied"]) for row in rows}
    found = forecasts(rows, LAW)
    assert all(max(map(abs, errors)) < spread(copied[text]) for text, errors in found.items())
    errors = np.concatenate([*found.values()])
    assert len(errors) >= 50
    assert np.sqrt(np.mean(errors**2)) < 0.025  # as docs/plan.md says


def test_the_range_covers_planned_runs_on_texts_outside_the_fit():
    with (ROOT / "benchmarks/plan.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "plan"]
    errors = [abs(float(row["val_bpb"]) / float(row["foretold"]) - 1) for row in rows]
    ranges = [spread(float(row["copied"])) for row in rows]
    assert len(rows) >= 9
    assert all(error < most for error, most in zip(errors, ranges, strict=True))
    assert sum(error < 0.03 for error in errors) >= 8  # as docs/plan.md says
