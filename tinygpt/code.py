"""The code that decides a result, as one text to compare: for DVC, for checkpoints and for shards of text.

A program's code is what it imports from this project, directly or not, wherever the import stands. Comments, docstrings
and layout do not count. Rooms that decide no result are left out: they keep a run alive, show it, or refuse it.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]  # of the project
OURS = ("tinygpt", "stages")  # packages of this project
# Rooms that change no result: this file, messages, params (their values are tracked), paths, the machine, runs.
DECIDES_NOTHING = ("code", "errors", "params", "paths", "progress", "run", "runtime", "stage", "threads", "yaml12")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PINNED = re.compile(r"^([\w.-]+)==", re.MULTILINE)  # in requirements.txt: packages whose version changes results


@cache
def code_of(module: str) -> str:
    """What decides the results of a module, such as "stages.clean": a hash of its code, and versions of what runs it.

    -> "3f2a90cc71d4e8b6 python=3.11 numpy=2.4.6"
    """
    files = closure(ROOT.joinpath(*module.split(".")).with_suffix(".py"))
    lines = [f"{path.relative_to(ROOT).as_posix()} {_read(path).meaning}" for path in sorted(files)]
    digest = hashlib.sha256("\n".join(lines).encode())
    imported = {name for path in files for name in _read(path).others}
    return " ".join([digest.hexdigest()[:16], *_versions(imported)])


def closure(path: Path) -> set[Path]:
    """The file and all files of this project that it imports, except for the rooms that decide nothing."""
    todo, seen = {path}, set[Path]()
    while todo:
        file = todo.pop()
        seen.add(file)
        todo |= {found for found in _read(file).ours if _room(found) not in DECIDES_NOTHING} - seen
    return seen


class _File(NamedTuple):
    """What counts in a file."""

    meaning: str  # its syntax tree without docstrings
    ours: frozenset[Path]  # files of this project that it imports, but not those for type checking alone
    others: frozenset[str]  # names of other packages


@cache
def _read(path: Path) -> _File:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours, others, for_typing = set[Path](), set[str](), set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for_typing.update(node.body)
        elif node in for_typing:
            continue
        elif isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            ours |= {file for name in names for file in _files_of(name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            others.add(node.module.partition(".")[0])
        elif isinstance(node, Documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return _File(ast.dump(tree), frozenset(ours - {path}), frozenset(others))


def _files_of(module: str) -> set[Path]:
    """The file of a module and the __init__ files above it; nothing where `module` is a name inside one."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    above = {ROOT.joinpath(*path.relative_to(ROOT).parts[:n], "__init__.py") for n in range(1, module.count(".") + 1)}
    return {file, *above} if file.exists() else set()


def _room(path: Path) -> str:
    """The room of a file: run for tinygpt/run/checkpoint.py, errors for tinygpt/errors.py."""
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "tinygpt" else parts[0]


def _versions(imported: set[str]) -> list[str]:
    """Python's version, as its Unicode tables and documentation are data here, and those of imported pinned packages.

    A build, such as PyTorch's "+cpu", does not count: the device of a run is not tracked either.
    """
    python = ".".join(platform.python_version_tuple()[:2])
    file = ROOT / "requirements.txt"  # in a checkout; an installed library has the same in its metadata
    text = file.read_text(encoding="utf-8") if file.exists() else "\n".join(requires("tinygpt") or ())
    modules = {name: name.removesuffix("-python").replace("-", "_") for name in sorted(PINNED.findall(text))}
    return [f"python={python}", *(f"{name}={version_of(name)}" for name in modules if modules[name] in imported)]


def version_of(package: str) -> str:
    """The version of a package without its build, such as "+cpu"; "none" where it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"
