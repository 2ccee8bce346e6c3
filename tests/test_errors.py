"""What a program says when it cannot go on: one line, with nothing in it that a terminal obeys."""

import pickle

import pytest

from tinygpt.errors import BREAK, UserError
from tinygpt.params import ParamsError


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "a\nb", "\r", "\x9b2J", "caf\udce9", "\u202egnp", "\x00"])
def test_a_message_has_nothing_that_a_terminal_obeys(name):
    for error in (UserError(f"data/{name} not found"), ParamsError([f"unknown key {name}"])):
        assert str(error).isprintable()
    assert str(UserError("日本 naïve 🙂 ½ not found")) == "日本 naïve 🙂 ½ not found"


def test_a_message_is_never_long_and_keeps_what_to_do_at_its_end():
    error = UserError(f"{'x' * 10**6} is not valid: take another")
    assert len(str(error)) < 1100
    assert str(error).endswith("is not valid: take another")
    many = str(ParamsError([f"problem {i}" for i in range(10_000)]))
    assert len(many.split(BREAK)) == 21
    assert many.endswith("and 9,980 more")


def test_an_error_is_the_same_after_it_came_from_another_process():
    for error in (UserError("one"), ParamsError(["one", "two"]), UserError(f"one{BREAK}two")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
