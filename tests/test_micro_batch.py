"""runtime.micro_batch_size=auto: which sizes are tried, and that trying changes nothing."""

import dataclasses
import time

import pytest
import torch
from conftest import RUNTIME, random_ids
from test_train import PARAMS, fit, make_learner, make_trainer, runs_in_tmp, same, train  # noqa: F401  runs_in_tmp is used by pytest

from tinygpt.errors import UserError
from tinygpt.run.costs import fastest, find_micro_batch_size, halves, largest
from tinygpt.runtime import out_of_memory

AUTO = dataclasses.replace(RUNTIME, micro_batch_size="auto")


def test_sizes_are_the_batch_and_its_halves_as_far_as_they_are_whole():
    assert halves(8) == [8, 4, 2, 1]
    assert halves(12) == [12, 6, 3]
    assert halves(7) == [7]


def test_the_largest_size_that_fits_is_taken():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest([16, 8, 4, 2, 1], attempt) == 2
    assert tried == [16, 8, 4, 2]
    with pytest.raises(UserError, match="not even the smallest micro-batch fits into the memory"):
        largest([16, 8, 4], attempt)


def test_the_size_of_least_time_a_sequence_is_taken():
    seconds = {8: 0.4, 4: 0.05, 2: 0.15}
    assert fastest(seconds, lambda size: time.sleep(seconds[size])) == 4
    with pytest.raises(UserError, match="not even the smallest micro-batch fits into the memory"):
        fastest([], lambda size: None)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trying_touches_neither_weights_nor_gradients_nor_random_numbers(precision, capsys):
    params = dataclasses.replace(PARAMS, precision=precision)
    tried, other = (make_learner(params=params, runtime=AUTO, dropout=0.2) for _ in range(2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    size = find_micro_batch_size(tried)
    assert capsys.readouterr().out == f"micro-batches of {size} of the 4 sequences of a step: the fastest of 4, 2, 1\n"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    assert same(tried.model.state_dict(), other.model.state_dict())
    for step in range(3):
        ids = random_ids(4, 65, seed=step)
        assert torch.equal(tried.learn(step, ids), other.learn(step, ids))
    assert same(tried.tensors()["weights"], other.tensors()["weights"])
    assert same(tried.tensors()["optimizer"], other.tensors()["optimizer"])


def test_a_run_searches_for_its_size_once_and_ends_as_one_with_that_size(capsys):
    found = train("found", runtime=AUTO)
    size = found.state.micro_batch_size
    assert capsys.readouterr().out.count("micro-batches of") == 1
    told = train("told", runtime=dataclasses.replace(RUNTIME, micro_batch_size=size))
    assert same(found.last, told.last)
    assert found.state.rows == told.state.rows
    trainer = make_trainer(runtime=AUTO)
    fit(trainer, "found")
    assert trainer.learner.micro_batch_size == size
    assert "micro-batches of" not in capsys.readouterr().out


def test_missing_memory_is_one_line_and_other_errors_are_raised():
    with pytest.raises(UserError, match="out of memory: lower it"), out_of_memory("lower it"):
        torch.empty(2**55)
    for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        with pytest.raises(UserError, match="out of memory: lower it"), out_of_memory("lower it"):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="must match the size"), out_of_memory("lower it"):
        torch.empty(2) + torch.empty(3)
    with pytest.raises(RuntimeError, match="an illegal memory access"), out_of_memory("lower it"):
        raise torch.AcceleratorError("an illegal memory access")  # a subclass of RuntimeError


def test_a_batch_that_does_not_fit_into_memory_is_not_tried():
    params = dataclasses.replace(PARAMS, batch_size=2**28 + 1)  # it has no halves
    one = make_learner(params=params, runtime=AUTO, n_layer=1)
    with pytest.raises(UserError, match="not even the smallest micro-batch fits"):
        find_micro_batch_size(one)
