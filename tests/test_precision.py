"""Number formats of training, loss scaling, and gradient checkpointing."""

import dataclasses
import math

import pytest
import torch
from conftest import RUNTIME, random_ids
from test_train import PARAMS, compile_by, fit, make_learner, make_trainer, runs_in_tmp, same, train  # noqa: F401  fixtures, too

from tinygpt.errors import UserError
from tinygpt.train.loss import PRECISIONS, pick_precision
from tinygpt.train.trainer import MAX_SKIPPED, TrainState

CPU = torch.device("cpu")
LONG = dataclasses.replace(PARAMS, max_steps=20)


def learner(*, gradient_checkpointing=False, precision="fp32", **config):
    runtime = dataclasses.replace(RUNTIME, gradient_checkpointing=gradient_checkpointing)
    return make_learner(params=dataclasses.replace(PARAMS, precision=precision), runtime=runtime, **config)


def scale_to(one, scale):
    one.scaler.scale(torch.ones(()))  # before this, the scaler has no scale
    one.scaler.update(new_scale=scale)


def test_auto_takes_bf16_only_where_the_processor_multiplies_it(monkeypatch):
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    for flags, chosen in {(False, False): "fp32", (True, False): "bf16", (False, True): "bf16"}.items():
        for name, flag in zip(names, flags, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag)
        assert pick_precision("auto", CPU, 192) == chosen
        assert pick_precision("auto", CPU, 128) == "fp32"
    assert pick_precision("auto", torch.device("mps"), 192) == "fp32"
    named = ["fp32", "tf32", "bf16", "fp16"]
    assert [pick_precision(name, CPU, 192) for name in named] == named


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_products_train_and_the_weights_stay_float32(precision):
    whole = train("whole", params=dataclasses.replace(LONG, precision="fp32")).state
    short = train("short", params=dataclasses.replace(LONG, precision=precision))
    first, last = short.state.rows[1]["train_loss"], short.state.rows[-1]["train_loss"]
    assert last < first - 0.1
    assert last == pytest.approx(whole.rows[-1]["train_loss"], abs=0.02)
    assert short.state.best_val_loss != whole.best_val_loss
    assert short.state.best_val_loss == pytest.approx(whole.best_val_loss, abs=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in short.last.values())


def test_tf32_on_a_cpu_is_fp32():
    runs = [train(name, params=dataclasses.replace(LONG, precision=name)) for name in ("fp32", "tf32")]
    assert same(runs[0].last, runs[1].last)
    assert runs[0].state.rows == runs[1].state.rows


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rmsnorm_of_low_precision_products_is_float32_and_warns_of_nothing(precision, recwarn):
    one = learner(precision=precision, qk_norm=True)
    torch.set_warn_always(True)
    try:
        one.learn(0, random_ids(4, 65))
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []
    short, norm = torch.randn(5, 8).to(PRECISIONS[precision]), one.model.blocks[0].attn.q_norm
    long = short.double()
    assert torch.allclose(norm(short).double(), long * (long.square().mean(-1, True) + norm.eps).rsqrt(), rtol=1e-6)


def test_gradients_are_scaled_back_before_they_are_clipped_and_reported():
    whole, short = learner(), learner(precision="fp16")
    ids = random_ids(4, 65)
    both = [each.learn(5, ids, with_part_norms=True) for each in (whole, short)]
    (loss, norm), (short_loss, short_norm) = both
    assert short.scaler.get_scale() == 65536
    assert short_loss.item() == pytest.approx(loss.item(), rel=1e-3)
    assert short_norm.item() == pytest.approx(norm.item(), rel=1e-2)
    assert short.part_norms["norm"].item() == pytest.approx(whole.part_norms["norm"].item(), rel=2e-2)
    for name, weight in whole.model.state_dict().items():  # AdamW's first step is as long as the learning rate
        assert (short.model.state_dict()[name] - weight).abs().mean() < 1e-3


def test_a_gradient_that_overflows_makes_no_step_and_halves_the_scale():
    one = learner(precision="fp16")
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    scale_to(one, 2.0**40)
    loss, norm = one.learn(5, random_ids(4, 65)).tolist()
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert same(before, one.model.state_dict())
    assert one.scaler.get_scale() == 2.0**39


def test_one_overflow_is_not_an_error_but_many_in_a_row_are():
    params, state = dataclasses.replace(PARAMS, precision="fp16"), TrainState()
    state.count(1, 5.0, math.inf, params)
    assert state.rows[-1]["grad_norm"] is None
    state.count(2, 5.0, 0.5, params)
    assert state.rows[-1]["grad_norm"] == 0.5
    for step in range(3, 3 + MAX_SKIPPED):
        state.count(step, 5.0, math.nan, params)
    with pytest.raises(UserError, match="gradient of step 33 overflows float16, as in the 30 steps before"):
        state.count(33, 5.0, math.inf, params)
    with pytest.raises(UserError, match="loss nan"):
        TrainState().count(1, math.nan, math.inf, params)
    with pytest.raises(UserError, match="gradient norm inf"):
        TrainState().count(1, 5.0, math.inf, PARAMS)


def test_steps_without_an_update_at_the_start_of_a_run_are_logged_and_skipped(capsys):
    params = dataclasses.replace(LONG, precision="fp16", eval_every=20)
    trainer = make_trainer(params=params, runtime=dataclasses.replace(RUNTIME, log_every=1))
    scale_to(trainer.learner, 2.0**30)
    rows = fit(trainer).state.rows[1:]
    n_skipped = sum(row["grad_norm"] is None for row in rows)
    assert 1 <= n_skipped < 15
    assert capsys.readouterr().out.count("gradient overflowed") == n_skipped
    assert rows[0]["train_loss"] - rows[-1]["train_loss"] > 0.05


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_that_are_computed_again_give_the_same_bits(precision, dropout):
    plain, again = (
        learner(gradient_checkpointing=on, precision=precision, dropout=dropout, n_layer=3) for on in (False, True)
    )
    for step in range(3):
        ids = random_ids(4, 65, seed=step)
        assert torch.equal(plain.learn(step, ids), again.learn(step, ids))
    assert same(plain.model.state_dict(), again.model.state_dict())
    with plain.evaluated() as model, again.evaluated() as other:
        assert plain.loss_of(model, ids) == again.loss_of(other, ids)


def test_blocks_that_are_computed_again_keep_little():
    def kept(one):
        sizes = {}
        ids = random_ids(4, 65)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            loss = one._loss(ids)
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(learner(n_layer=8)) > 2 * kept(learner(n_layer=8, gradient_checkpointing=True))


def test_compiled_blocks_that_are_computed_again_give_the_same_model_up_to_rounding(monkeypatch):
    compile_by("aot_eager", monkeypatch)  # this backend decides what is recomputed
    params = dataclasses.replace(PARAMS, max_steps=5, precision="fp16")
    runtime = dataclasses.replace(RUNTIME, gradient_checkpointing=True)
    eager = train("eager", params=params, runtime=runtime, n_layer=1)
    compiled = train("compiled", params=params, runtime=dataclasses.replace(runtime, compile=True), n_layer=1)
    for name in eager.last:
        torch.testing.assert_close(compiled.last[name], eager.last[name], atol=1e-2, rtol=1e-2)
    for ours, theirs in zip(compiled.state.rows[1:], eager.state.rows[1:], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    for ours, theirs in zip(compiled.state.norms, eager.state.norms, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)  # would show a wrong gradient, which AdamW's steps hide
