"""The corpus that every Python carries: docstrings of the standard library and pydoc's topics.

The files are parsed, never imported, so nothing in them runs. The result depends on the Python version alone.
"""

from __future__ import annotations

import ast
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tinygpt.errors import UserError

# Left out: what is not the standard library, its tests, and the parts that some installations come without.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "distutils"}
SKIPPED |= {"lib2to3", "ensurepip", "pydoc_data", "__pycache__"}
FEWEST_MODULES = 100  # a standard library in a zip or without sources has next to none

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_version() -> str:
    """The version that decides the text, such as "3.11.7"."""
    return platform.python_version()


def iter_python_docs(stdlib: Path | None = None) -> Iterator[str]:
    """One document a module, in the order of their names, then one a topic of pydoc.

    Raises UserError when the sources (`*.py`) of the standard library are not installed.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    paths = dict(_modules(stdlib))
    if len(paths) < FEWEST_MODULES:
        raise UserError(
            f"download.source=python-docs needs the sources of Python's standard library, found {len(paths)} modules "
            f"in {stdlib}: use a Python that has them, or another source"
        )
    for name in sorted(paths):
        document = _module_document(name, paths[name])
        if document:
            yield document
    yield from _topics(stdlib / "pydoc_data" / "topics.py")


def _modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module that an import can name, less what is left out."""
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED]
        parts = Path(folder).relative_to(stdlib).parts
        for file in files:
            stem, _, ending = file.partition(".")
            if ending == "py" and stem.isidentifier():
                yield ".".join(parts if stem == "__init__" else (*parts, stem)), Path(folder, file)


def _module_document(name: str, path: Path) -> str:
    tree = _parse(path)
    if tree is None:
        return ""
    own = ast.get_docstring(tree)
    parts = [f"module {name}\n\n{own}"] if own else []
    for heading, docstring in _definitions(tree, name):
        parts.append(f"{heading}\n\n{docstring}")
    return "\n\n\n".join(parts) + "\n" if parts else ""


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stray backslash in somebody's string is not our concern
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a file for another version of Python
            return None


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Every class and function with a docstring as (heading, docstring), in source order, none inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child)
            if docstring:
                yield _heading(child, name), docstring
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name)
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(child, prefix)


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _topics(path: Path) -> Iterator[str]:
    """The texts of `help("topics")`, which stand as one dict literal in a module of their own."""
    tree = _parse(path) if path.exists() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield topics[name].strip("\n") + "\n"
