"""Wrong values: wherever they come from, the message says in words what is wrong, and shows them as written."""

import dataclasses
import json
import math
import random
import re
from datetime import date

import pytest
from conftest import tiny_model

from tinygpt import options
from tinygpt.cli import flags
from tinygpt.cli.main import COMMANDS, build_parser
from tinygpt.errors import shown
from tinygpt.params import GROUPS, PARAMS_FILE, ParamsError, Within, find_class, from_mapping, read_groups
from tinygpt.serve.request import Body, Refusal, Served, read_request
from tinygpt.yaml12 import load_yaml

OPTIONS = [
    *(cls for cls in vars(options).values() if isinstance(cls, type) and issubclass(cls, options.Checked)),
    *(cls for cls in vars(flags).values() if isinstance(cls, type) and cls.__module__ == flags.__name__),
    Body,
]
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1.5,
    10**30,
    -(10**400),
    math.nan,
    -math.inf,
    "",
    "x",
    "on",
    "1",
    "it's",
    "\ud800\x1b[2J",
]
ODD += [(), [None, True], (1, 2), ((1, "x"), (2,)), {}, {"a": None}, {1: 2}, {(1, 2): 3}, date(2024, 1, 1), b"a", {1}]
ODD += [object(), int, ["\0"] * 10**5]
PYTHON = re.compile(r"\b(None|True|False|datetime|object at|class)\b|'|\(\)|\(\d|\bb\"")


def check_problems(error: ParamsError, name: str) -> None:
    for problem in error.problems:
        assert re.match(rf"(unknown key |missing key )?{name}\b", problem), problem
        told, printed = str(ParamsError([problem])), PYTHON.search(problem.replace("it's", ""))
        assert told.isprintable() and len(told) < 1200 and not printed, (problem, printed)


@pytest.mark.parametrize("cls", dict.fromkeys(OPTIONS), ids=lambda cls: cls.__name__)
def test_every_option_takes_a_value_of_its_type_or_refuses_it_by_name(cls):
    for option in options.options_of(cls):
        for value in ODD:
            try:
                found = getattr(cls(**{option.name: value}), option.name)
            except ParamsError as error:
                check_problems(error, option.name)
                continue
            kind = getattr(option.type, "__origin__", option.type)
            assert option.choices or found is None or isinstance(found, kind), (option.name, value)
    assert cls() == dataclasses.replace(cls())


@pytest.mark.parametrize("bias", [-2e9, 1e300])
def test_a_bias_in_which_every_logit_would_drown_is_refused(bias):
    with pytest.raises(ParamsError, match=r"logit_bias=.* must be from -1e9 to 1e9: use banned_ids to forbid a token"):
        options.Sampling(logit_bias=((1, 5.0), (2, bias)))


@pytest.mark.parametrize("group", GROUPS)
def test_every_param_that_is_refused_is_reported_as_it_was_written(group):
    cls, right = find_class(group), read_groups(PARAMS_FILE)[group]
    refused = set()
    for key in right:
        for value in [*ODD, *map(load_yaml, (b"2024-01-01", b"{2024-01-01: x}", b"!!binary aGk=", b"!!set {a}", b"~"))]:
            try:
                from_mapping(cls, right | {key: value}, prefix=f"{group}.")
            except ParamsError as error:
                check_problems(error, group)
                assert any(key in problem for problem in error.problems)
                refused.add(key)
    assert refused == set(right)


def test_a_date_is_reported_as_it_was_written():
    right = read_groups(PARAMS_FILE)["train"]
    for text in ("2024-01-01", "2024-01-01 10:00:00"):
        with pytest.raises(ParamsError, match=f"^train.seed={text} must be a whole number$"):
            from_mapping(find_class("train"), right | {"seed": load_yaml(text.encode())}, prefix="train.")


def test_what_is_shown_of_a_value_is_read_as_the_same_value():
    rng = random.Random(0)
    letters = "ab1-.:#'\"[]{},&*!|>%@`~ \t\n\\é漢\x00\x85\u2028\ufeff0eEnullTrue"

    def value(depth: int = 0):
        kinds = [
            lambda: "".join(rng.choices(letters, k=rng.randint(0, 6))),
            lambda: rng.choice(
                ["null", "~", "true", "True", "NULL", "on", "no", "1e5", "0x1", ".5", ".inf", "-", "a.b"]
            ),
            lambda: rng.choice([None, True, False, 0, -7, 10**20, 0.5, 1e-05, 1e30, -1.0]),
            lambda: [value(depth + 1) for _ in range(rng.randint(0, 3))],
            lambda: {f"k{i}": value(depth + 1) for i in range(rng.randint(0, 3))},
        ]
        return rng.choice(kinds[: 3 if depth > 2 else 5])()

    for _ in range(2000):
        given = value()
        told = shown(given)
        assert told.isprintable()
        if "\\" not in told and "\t" not in told:  # YAML and JSON escape some characters differently
            assert load_yaml(told.encode()) == given, (given, told)
    assert [shown(each) for each in ("null", "None", "a b", "", "1", 1, (1, "a"))] == (
        ['"null"', "None", '"a b"', '""', '"1"', "1", '[1, "a"]']
    )


INTERVALS = {
    "[1, inf)": "1 or more",
    "(0, inf)": "above 0",
    "(0, 1]": "above 0 and at most 1",
    "[0, 1)": "0 or more and below 1",
    "(0, 1)": "above 0 and below 1",
    "[-2, 2]": "from -2 to 2",
    "(-inf, inf)": "a finite number",
}


@pytest.mark.parametrize(("interval", "words"), INTERVALS.items())
def test_an_interval_has_its_bounds_and_its_words(interval, words):
    within = Within(interval)
    assert str(within) == words
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    assert (low in within, high in within) == (interval[0] == "[", interval[-1] == "]")
    inside = 0.5 if high == 1 else max(low, -1.0) + 1
    assert inside in within
    assert all(beyond not in within for beyond in (low - 1, high + 1) if math.isfinite(beyond))


def numbers_of(name: str) -> list[tuple[str, str]]:
    """The flags of a command that take numbers, each with its placeholder in the help."""
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    found = commands.choices[name]._actions
    return [(action.option_strings[-1], action.metavar) for action in found if action.metavar in ("N", "X", "ID")]


@pytest.mark.parametrize("name", [name for name in COMMANDS if numbers_of(name)])
def test_a_flag_that_is_not_a_number_is_reported_in_our_words_whatever_the_command(name, command):
    others = {"attention": ["-p", "a"], "runs": ["--prune"]}.get(name, [])
    for flag, kind in numbers_of(name):
        at = r"\[0\]" if kind == "ID" else ""
        for value, is_told in (("x", "x"), ("", '""'), ("1;2", '"1;2"'), ("nan", "nan")):
            done = command(name, *others, flag, value)
            told = rf"error: (.*\n *)*{flag}{at}={is_told} must be (a whole number|a finite number)\n"
            assert done.returncode == 1 and re.match(told, done.stderr), (flag, value, done.stderr)
            assert "invalid" not in done.stderr and not done.stdout


@pytest.mark.parametrize("value", ["", "5", "5=", "=1", "5=x", "x=5", "5=1=1", "5=--1", "5=1e"])
def test_a_bias_that_is_not_one_is_reported_in_our_words(value, command):
    done = command("generate", "--logit-bias", value)
    assert (done.returncode, done.stderr) == (1, f"error: --logit-bias={value} must be ID=BIAS, such as 17=-2.5\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "xml"], "error: --format=xml is not one of text, json, jsonl\n"),
        (["--device", "cdua"], "error: --device=cdua is not one of auto, cpu, cuda, mps (did you mean cuda?)\n"),
        (["--quantize", "4"], 'error: --quantize="4" is not one of int8, int4\n'),
        (
            ["--prompt-lookup=1"],
            "error: --prompt-lookup takes no value, found 1: see python -m tinygpt generate --help\n",
        ),
        (["--seed", "1e3", "--seed", "-1"], "error: --seed=-1 must be from 0 to 4294967295\n"),
    ],
)
def test_a_choice_that_is_not_there_is_reported_with_those_that_are(args, message, command):
    assert command("generate", *args, "--model", "nowhere").stderr == message


RAW = 'null true false -1 0 1.5 1e400 1e30 NaN -Infinity 99999999999999999999 "" "x" "1" "\\ud800" [] [null] [1.5] {}'
RAW += ' ["a",1] [[1]] [[1,2,3]] {"a":1} {"1":"x"} {"1":1e9} {"-1":1} {"include_usage":1} [{"role":"user"}]'
OTHERS = {
    False: ["prompt", "suffix", "best_of", "unknown"],
    True: ["messages", "top_logprobs", "max_completion_tokens", "tools", "response_format", "unknown"],
}


@pytest.mark.parametrize("is_chat", [False, True], ids=["completion", "chat"])
def test_a_wrong_value_in_a_request_is_refused_by_its_name(is_chat, tiny_tokenizer):
    models = {"tiny": Served("tiny", tiny_model(), tiny_tokenizer, 1)}
    base = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    n_refused = 0
    for name in [*(field.name for field in dataclasses.fields(Body)), *OTHERS[is_chat]]:
        needed = {"logprobs": True} if name == "top_logprobs" else {}
        rest = {key: value for key, value in (base | needed).items() if key != name}
        for value in RAW.split():
            raw = f"{{{json.dumps(name)}: {value}, {json.dumps(rest)[1:]}".replace(", }", "}")
            try:
                read_request(raw.encode(), models, options.Limits(), is_chat=is_chat)
            except Refusal as refusal:
                n_refused += 1
                status = 404 if name == "model" and value in ('""', '"x"', '"1"') else 400
                assert (refusal.status, refusal.param) == (status, name), raw
                assert name in refusal.message and not PYTHON.search(refusal.message), (raw, refusal.message)
                json.dumps(refusal.body(), ensure_ascii=False).encode()
    assert n_refused > 400
