"""Load and check params.yaml: YAML 1.2, strict keys, typed values, every problem in one error.

Each group of params.yaml is a frozen dataclass that lives next to the code it controls and has the group's name in
`group`. A method `rules_with(groups)`, if it has one, returns what must hold together with the other groups, given by
name. The file must give every field a value, even one with a default in Python.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import re
import sys
import types
import typing
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

from tinygpt.errors import UserError, shown
from tinygpt.files import read_json, some_of
from tinygpt.yaml12 import load_yaml

PARAMS_FILE = Path("params.yaml")

# Where each group's dataclass lives. Read by name, so that a stage depends only on the groups that it imports.
GROUPS = {
    "download": "tinygpt.corpus.sources:DownloadParams",
    "clean": "tinygpt.corpus.clean:CleanParams",
    "tokenizer": "tinygpt.tokenizer.kinds:TokenizerParams",
    "model": "tinygpt.model.config:ModelParams",
    "train": "tinygpt.train.config:TrainParams",
    "evaluate": "tinygpt.report.config:EvaluateParams",
    "plot": "tinygpt.report.config:PlotParams",
    "export": "tinygpt.export.config:ExportParams",
    "runtime": "tinygpt.runtime:RuntimeParams",
}

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
T = TypeVar("T")


class ParamsError(UserError):
    """What is wrong with the params, one problem per line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(problems)


@dataclasses.dataclass(frozen=True)
class Within:
    """An interval in mathematical notation, for `Annotated[float, Within("[0, 1)")]`."""

    interval: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        return above and (value < high or (value == high and self.interval[-1] == "]"))

    def __str__(self) -> str:
        """In words: "1 or more", "above 0 and at most 1", "from 0 to 1"."""
        first, (low, high), last = self.interval[0], self.interval[1:-1].split(", "), self.interval[-1]
        if first + last == "[]":
            return f"from {low} to {high}"
        least = f"{low} or more" if first == "[" else "a finite number" if low == "-inf" else f"above {low}"
        return least + ("" if high == "inf" else f" and {'at most' if last == ']' else 'below'} {high}")


HALVES = re.compile("[\ud800-\udfff]")  # half characters, which UTF-8 cannot hold
DERIVED = object()  # marks a field that may be null in the file; `__post_init__` then derives its value

Count = Annotated[int, Within("[1, inf)")]  # a whole number of things, at least one
CountOrDerived = Annotated[int, Within("[1, inf)"), DERIVED]
Fraction = Annotated[float, Within("[0, 1)")]  # a share that leaves some of the whole


def require(*rules: tuple[bool, str]) -> None:
    """Raise one ParamsError with the message of every rule that does not hold."""
    problems = [message for holds, message in rules if not holds]
    if problems:
        raise ParamsError(problems)


@overload
def load_params(a: type[A], /, *, path: Path = ...) -> A: ...
@overload
def load_params(a: type[A], b: type[B], /, *, path: Path = ...) -> tuple[A, B]: ...
@overload
def load_params(a: type[A], b: type[B], c: type[C], /, *, path: Path = ...) -> tuple[A, B, C]: ...
def load_params(*classes: Any, path: Path = PARAMS_FILE) -> Any:
    """Read the groups of these dataclasses: `model, train = load_params(ModelParams, TrainParams)`.

    Raises ParamsError with every problem of all groups, each naming its key, and the nearest name for a typo.
    """
    groups = check_params(path)
    found = tuple(groups[cls.group] for cls in classes)
    return found[0] if len(found) == 1 else found


def check_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """All groups by name, each checked by itself and together with the others.

    So mistakes are reported before any work, and one in `evaluate` does not come to light after an hour of training.
    """
    document = read_groups(path)
    groups, problems = dict[str, Any](), _key_problems(document, list(GROUPS), "")
    for name in filter(document.__contains__, GROUPS):  # missing groups have been reported above
        try:
            groups[name] = from_mapping(find_class(name), document[name], prefix=f"{name}.")
        except ParamsError as error:
            problems += error.problems
    for group in groups.values():
        rules = group.rules_with(groups) if hasattr(group, "rules_with") else ()
        problems += [message for holds, message in rules if not holds]
    if problems:
        raise ParamsError(problems)
    return groups


def check_names(names: Iterable[str]) -> None:
    """Raise ParamsError with every name that does not begin with a "group.key", and the nearest one."""
    known = [f"{group}.{key}" for group in GROUPS for key in _field_hints(find_class(group))]
    keys = [".".join(name.split(".")[:2]) for name in names]
    require(*((key in known, f"unknown key {key}{nearest(key, known)}") for key in keys))


def find_class(group: str) -> Any:
    """The dataclass of a group."""
    module, name = GROUPS[group].split(":")
    return getattr(importlib.import_module(module), name)


def nearest(name: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """` (did you mean model.n_layer?)` if a known name is near, else nothing."""
    return "".join(f" (did you mean {prefix}{near}?)" for near in difflib.get_close_matches(name, [*known], 1, cutoff))


def from_mapping(cls: type[T], mapping: Any, *, prefix: str = "", others: Sequence[str] = ()) -> T:
    """Build a dataclass from a mapping with exactly its fields as keys.

    A field whose type admits None may be null. An int field accepts 8.0, but not 8.5, true or "8". `others` are keys
    that are read elsewhere: an unknown key may be a misspelling of one of them.
    Raises ParamsError with all problems.
    """
    if not isinstance(mapping, dict):
        raise ParamsError([f"{prefix.rstrip('.')} must be a mapping of keys to values, found {shown(mapping)}"])
    names = [*_field_hints(cls)]  # type: ignore[arg-type]  # mypy thinks that not every class can be hashed
    return cls(**typed(cls, mapping, prefix, _key_problems(mapping, names, prefix, others)))


def typed(cls: Any, mapping: dict[str, Any], prefix: str = "", problems: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a dataclass's fields, in their types.  Raises ParamsError with `problems` and all new ones."""
    found, values = [*problems], dict[str, Any]()
    for key, hint in _field_hints(cls).items():
        if key in mapping:
            try:
                values[key] = coerce(mapping[key], hint, prefix + key)
            except ParamsError as error:
                found += error.problems
    if found:
        raise ParamsError(found)
    return values


def read_record(cls: type[T], path: Path, *, stage: str, besides: Container[str] | None = None) -> T:
    """A dataclass from the keys of a JSON file that `stage` makes.

    Keys that are not fields are ignored; with `besides`, only those in it. Raises UserError that names the file and
    every key that is missing, unknown or of another type.
    """
    document, names = read_json(path, stage=stage), _field_hints(cls)  # type: ignore[arg-type]  # as above
    ignored = [key for key in document if key not in names and (besides is None or key in besides)]
    try:
        return from_mapping(cls, {key: document[key] for key in document if key not in ignored})
    except ParamsError as error:
        problems = "; ".join(error.problems)
        raise UserError(f"{path} was written by another version ({problems}): run `dvc repro {stage}`") from None


def flat_params(raw: bytes) -> dict[str, str]:
    """What decides a result in a params file, as written there, by "group.key".  Raises UserError for other files."""
    groups = _groups(raw, PARAMS_FILE).items()
    rows = [(f"{name}.{key}", value) for name, keys in groups for key, value in keys.items() if name != "runtime"]
    # without the quotes that shown() puts around texts
    return {name: shown(value) if isinstance(value, bool | None) else str(value) for name, value in rows}


def read_bytes(path: Path) -> bytes:
    """Read a params file.  Raises UserError when there is none; a pipe or a device does not count."""
    if not path.is_file():
        raise UserError(f"{path} not found: run this from the project's top folder")
    return path.read_bytes()


def read_groups(path: Path) -> dict[str, dict[str, Any]]:
    """The groups of a params file, or of a preset, as written there.  Raises UserError when it has none."""
    return _groups(read_bytes(path), path)


def _groups(raw: bytes, path: Path) -> dict[str, dict[str, Any]]:
    try:
        document = copy.deepcopy(_document(raw))  # the caller may change what it gets
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    some = "the" if path.name == PARAMS_FILE.name else "some of the"  # a preset has those that it changes
    groups = f"{path} must hold {some} groups {', '.join(GROUPS)}, each with its keys"
    if not isinstance(document, dict):
        raise UserError(groups)
    if odd := [shown(name) for name, keys in document.items() if not isinstance(keys, dict)]:
        raise UserError(f"{groups}, but {some_of(odd, 3)} has none")
    return document


@functools.lru_cache(4)
def _document(raw: bytes) -> Any:
    return load_yaml(raw)  # takes 50 ms, and a stage asks for its params several times


def _key_problems(mapping: dict[str, Any], known: list[str], prefix: str, others: Sequence[str] = ()) -> list[str]:
    names = [key if isinstance(key, str) else shown(key) for key in mapping if key not in known]
    problems = [f"unknown key {prefix}{name}{_meant(name, [*known, *others], prefix)}" for name in names]
    return problems + [f"missing key {prefix}{key}" for key in known if key not in mapping]


def _meant(name: str, known: list[str], prefix: str) -> str:
    """` (did you mean train.lr?)` for model.lr, and for train.lrr."""
    groups = GROUPS if prefix.removesuffix(".") in GROUPS else ()
    homes = [group for group in groups if name in _field_hints(find_class(group))]
    return f" (did you mean {homes[0]}.{name}?)" if len(homes) == 1 else nearest(name, known, prefix=prefix)


@functools.cache
def _field_hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def coerce(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`, or raise a ParamsError that names `key`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    may_be_null = origin in (types.UnionType, typing.Union) or DERIVED in args
    require((not may_be_null or value != "None", f"{key}=None must be null, as YAML writes it"))
    if origin is Annotated:
        found: Any = None if value is None and DERIVED in args else coerce(value, args[0], key)
        intervals = [arg for arg in args if isinstance(arg, Within) and found is not None]
        require(*((found in each, f"{key}={shown(value)} must be {each}") for each in intervals))
        return found
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        names = [arg for arg in inner if typing.get_origin(arg) is Literal]
        return coerce(value, names[0] if names and isinstance(value, str) else inner[0], key)
    if origin is Literal:
        return _choice(value, args, key)
    if origin is tuple:
        return _sequence(value, args, key)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, prefix=f"{key}.")
    return _scalar(value, hint, key)


def _choice(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    if value in choices:
        return value
    near = nearest(str(value), [str(choice) for choice in choices], cutoff=0.7)  # does not suggest cpu for gpu
    raise ParamsError([f"{key}={shown(value)} is not one of {', '.join(map(shown, choices))}{near}"])


def _sequence(value: Any, args: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ParamsError([f"{key}={shown(value)} must be a list, such as [a, b]"])
    args = (args[0],) * len(value) if args[-1] is Ellipsis else args
    require((len(value) == len(args), f"{key}={shown(value)} must have {len(args)} values"))
    return tuple(coerce(item, arg, f"{key}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))


def _scalar(value: Any, kind: type, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_number = is_number and abs(value) <= sys.float_info.max  # no infinity, no NaN, nothing that overflows
    if kind is int and is_number and float(value).is_integer():
        require((abs(value) < 2**63, f"{key}={shown(value)} must be between -2^63 and 2^63"))
        return int(value)
    if kind is float and is_number:
        return float(value)
    if kind is str and isinstance(value, str):
        require((not HALVES.search(value), f"{key}={shown(value)} must not have half characters such as \\ud800"))
        return value
    if kind not in (int, float, str) and isinstance(value, kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    raise ParamsError([f"{key}={shown(value)} must be {names.get(kind, 'a path')}"])
