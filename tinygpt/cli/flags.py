"""Turn the fields of dataclasses into flags, and what the user typed into dataclasses.

A field whose type has a help text becomes a flag (`tinygpt/options.py`). argparse gets no defaults, so that only flags
that the user typed can contradict each other; all others have the field's own default. Nothing here imports PyTorch or
pandas.
"""

import json
import re
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tinygpt import paths
from tinygpt.errors import UserError, shown
from tinygpt.files import runs_folder
from tinygpt.options import Checked, Option, Proposals, Settings, make_settings, options_of, setting_options
from tinygpt.params import Count, ParamsError, Within, coerce, nearest, require

STDIN = "-"
GGUF = paths.EXPORT / "gguf/tinygpt-f32.gguf"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Checked):
    """The device of our own model, and how its weights are stored."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "for tinygpt's engine"] = "auto"
    quantize: Annotated[
        Literal["int8", "int4"] | None, "store weights in 8 or 4 bits: takes less memory, and large models get faster"
    ] = None
    compile: Annotated[
        bool, "compile the steps: up to two minutes the first time, then seconds; one text is 1.5 to 3 times as fast"
    ] = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions(DeviceOptions):
    """Which model, and which engine computes it."""

    model: Annotated[Path | None, f"a tinygpt or transformers folder, or a .gguf file (default: {paths.MODEL})"] = None
    tokenizer: Annotated[Path | None, "its tokenizer's folder (default: itself, or `tokenizer` next to it)"] = None
    run: Annotated[str | None, "instead of --model: a run's newest checkpoint, by its name in runs/ or `newest`"] = None
    engine: Annotated[Literal["auto", "tinygpt", "llama.cpp"], "auto: llama.cpp for a .gguf file"] = "auto"

    @property
    def path(self) -> Path:
        """Where the model is.  Raises UserError if the run has none, or if several runs fit the name."""
        if self.run is not None:
            require((self.model is None, f"--run and --model={self.model} both name a model: give one of them"))
            folder = find_run(None if self.run == "newest" else self.run, "step-*/state.json")
            if not (folder / "model/model.safetensors").exists():
                raise UserError(
                    f"{folder} has no model that --run can read: it trains adapters, or has just begun. Use "
                    f"{paths.MODEL} when it has finished"
                )
            return folder / "model"
        return self.model or (GGUF if self.engine == "llama.cpp" else paths.MODEL)


def find_run(name: str | None, file: str) -> Path:
    """The folder in runs/ that has this file and whose name begins with `name`; without a name, the newest.

    Raises UserError if there is none, or more than one with that name.
    """
    changed: dict[Path, float] = {}  # each folder's newest file
    for path in runs_folder().glob(f"*/{file}"):
        if not any(part.endswith(".partial") for part in path.parts):
            folder = runs_folder() / path.relative_to(runs_folder()).parts[0]
            with suppress(FileNotFoundError):  # a checkpoint that the trainer has just removed
                changed[folder] = max(path.stat().st_mtime, changed.get(folder, 0.0))
    there = sorted(changed, key=changed.__getitem__)
    named = there[-1:] if name is None else [folder for folder in there if folder.name.startswith(name)]
    if not there:
        raise UserError(
            f"no run has {Path(file).name}, which training writes: start it with `dvc repro`. A finished model is "
            f"in {paths.MODEL}"
        )
    if len(named) != 1:
        names = ", ".join(folder.name for folder in reversed(named or there))
        found = "several runs have names that begin" if named else "no run has a name that begins"
        raise UserError(f"{found} with {name}: choose one of {names}")
    return named[0]


@dataclass(frozen=True, kw_only=True)
class ProposalOptions(Proposals):
    """Where speculative decoding gets its proposals, and how many."""

    draft: Annotated[Path | None, "folder of a smaller model with the same tokenizer, which proposes tokens"] = None
    prompt_lookup: Annotated[bool, "propose what followed an earlier occurrence of the last tokens"] = False

    @property
    def flag(self) -> str | None:
        """The flag that asks for proposals; None if there is none."""
        return "--draft" if self.draft else "--prompt-lookup" if self.prompt_lookup else None


@dataclass(frozen=True, kw_only=True)
class TextOptions(Checked):
    """How many texts, and how they are printed."""

    n: Annotated[int, Within("[1, 1000]"), "texts for each prompt, each with the next seed"] = 1
    batch_size: Annotated[Count, "texts computed together"] = 32
    format: Annotated[Literal["text", "json", "jsonl"], "output format"] = "text"
    logprobs: Annotated[
        int | None, Within("[0, inf)"), "log-probabilities of each token, and of the N likeliest; not in --format text"
    ] = None


def bias(text: str) -> tuple[int, float]:
    """17=-2.5 -> (17, -2.5)"""
    token, _, added = text.partition("=")
    try:
        return int(token), float(added)
    except ValueError:
        raise ParamsError([f"--logit-bias={text} must be ID=BIAS, such as 17=-2.5"]) from None


def number(text: str) -> int | float | str:
    """What was typed, as a number if it is one; otherwise `typed` reports it later, with all other mistakes."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


SHORT = {"model": ["-m"], "max_new_tokens": ["-n"]}  # as in llama.cpp, and so is -p for the prompt
# How help texts name values; how argparse reads lists, by the type of their items.
VALUES: dict[type, str] = {int: "N", float: "X", str: "NAME", Path: "PATH"}
LISTS: dict[Any, dict[str, Any]] = {
    int: {"type": number, "metavar": "ID", "nargs": "+", "action": "extend"},
    str: {"metavar": "TEXT", "action": "append"},
    tuple[int, float]: {"type": bias, "metavar": "ID=BIAS", "action": "append"},
}


def add_flags(command: ArgumentParser, *classes: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Add a flag for each field with a help text; the help shows `defaults` in place of the fields' own."""
    for option in (option for cls in classes for option in options_of(cls) if option.help):
        default = (defaults or {}).get(option.name, option.default)
        shown = "" if option.type is bool or default in (None, ()) else f" (default: {default})"
        names = (*SHORT.get(option.name, ()), flag(option.name))
        command.add_argument(*names, help=f"{option.help}{shown}", **reading(option))


def existing(flag: str, text: str) -> Path:
    """A path that a command reads, given with this flag."""
    require((bool(text) and Path(text).exists(), f"{flag} {shown(text)} not found: give an existing folder or file"))
    return Path(text)


def picture(text: str) -> Path:
    """A path for a plot."""
    from tinygpt.report.plots import NO_DATE  # here, as it takes a second

    require((Path(text).suffix[1:] in NO_DATE, f"--plot {text}: the name must end in .{' or .'.join(NO_DATE)}"))
    return Path(text)


def page(text: str) -> Path:
    """A path for a page."""
    require((Path(text).suffix in (".html", ".htm"), f"--page {text}: the name must end in .html"))
    return Path(text)


def add_number(command: ArgumentParser, name: str, hint: Any, **more: Any) -> None:
    """Add a flag for a number that is not in a dataclass.  Parsing raises ParamsError for a value that does not fit."""
    command.add_argument(name, type=lambda text: coerce(number(text), hint, name), metavar="N", **more)


def reading(option: Option) -> dict[str, Any]:
    """The arguments with which argparse reads an option."""
    if option.type is bool:
        return {"action": "store_true", "default": None}
    if option.choices:
        return {"metavar": f"{{{','.join(option.choices)}}}"}
    if option.is_list:
        return LISTS[typing.get_args(option.type)[0]]
    return {"type": number if option.type in (int, float) else option.type, "metavar": VALUES[option.type]}


def flag(name: str) -> str:
    """top_p -> --top-p"""
    return f"--{name.replace('_', '-')}"


def read(cls: type[T], args: Namespace) -> T:
    """The options of a dataclass.  Raises ParamsError with everything that is wrong, by the names of flags."""
    names = [option.name for option in options_of(cls) if option.help]
    with named_as_flags(names):
        return cls(**given(args, names))


def read_settings(args: Namespace) -> Settings:
    """The settings of generation.  Raises ParamsError with everything that is wrong, by the names of flags."""
    with named_as_flags():
        return make_settings(given(args, setting_options()))


def given(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values that the user gave, by name."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


@contextmanager
def named_as_flags(names: Iterable[str] | None = None) -> Iterator[None]:
    """Report mistakes by the names of flags: --top-p for top_p."""
    # a name that could be an ordinary word counts as a name only before "="
    pattern = "|".join(rf"\b{name}\b" if "_" in name else rf"\b{name}(?==)" for name in names or setting_options())
    try:
        yield
    except ParamsError as error:
        raise ParamsError([re.sub(pattern, lambda found: flag(found[0]), each) for each in error.problems]) from None


def parse_settings(text: str) -> tuple[dict[str, Any], list[str]]:
    """'top_k=5 stop=["a b", "c"]' -> {"top_k": 5, "stop": ["a b", "c"]}, and a list of what is wrong.

    A value is JSON or, if it is not, a word.
    """
    options, found, problems = setting_options(), dict[str, Any](), list[str]()
    while text := text.lstrip():
        named = re.match(r"([\w-]+)=", text)
        if not named:
            word = text.split()[0]
            problems.append(f"{shown(word)} is not of the form NAME=VALUE")
            text = text.removeprefix(word)
            continue
        name = named[1].replace("-", "_")
        value, text = _value(text[named.end() :])
        if option := options.get(name):
            value = shown(value) if option.choices else value  # `true` is a word among choices
            found[name] = [value] if option.is_list and not isinstance(value, list) else value
        else:
            problems.append(f"unknown option {name}{nearest(name, options)}")
    return found, problems


def _value(text: str) -> tuple[Any, str]:
    """The value at the beginning of a text, and the rest."""
    with suppress(ValueError, RecursionError):
        value, end = json.JSONDecoder().raw_decode(text)
        if not text[end : end + 1].strip():  # otherwise it is a word such as 5th
            return value, text[end:]
    word, *rest = text.split(None, 1) or [""]
    return number(word), "".join(rest)  # .5 is not JSON
