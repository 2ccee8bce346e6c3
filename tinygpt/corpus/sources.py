"""Where text comes from: the `download` group of params.yaml, the sources it can name, and the corpus that comes with
Python: the docstrings of the standard library and pydoc's topics.
"""

import ast
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from tinygpt.errors import UserError, shown
from tinygpt.params import Count, require

MOST_NAME = 255  # bytes of a file's name that file systems allow


@dataclass(frozen=True, kw_only=True)
class DownloadParams:
    """The `download` group of params.yaml."""

    group: ClassVar[str] = "download"

    source: str  # a name in SOURCES, gutenberg:<id>, a URL, or a local file, folder or glob
    sha256: str | None  # expected hash of the one downloaded file; null = the named source's, where it has one
    max_bytes: Count | None  # UTF-8 bytes of text kept of each official split; null = all
    encoding: str | None  # of the files that are not UTF-8; null = those are left out

    def __post_init__(self) -> None:
        require(
            (bool(self.source.strip()), "download.source is empty: give a name, URL, file, folder or glob"),
            (
                self.sha256 is None or re.fullmatch("[0-9a-f]{64}", self.sha256) is not None,
                f"download.sha256={shown(self.sha256)} must be 64 characters of 0-9 and a-f",
            ),
            (
                self.encoding is None or _is_encoding(self.encoding),
                f"download.encoding={shown(self.encoding)} is not a text encoding of Python, such as cp1252 or utf-16",
            ),
        )


def _is_encoding(name: str) -> bool:
    try:
        return bool("a".encode(name))
    except (LookupError, ValueError):  # unknown, for bytes only (such as hex), or one that always fails
        return False


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file to download."""

    url: str
    name: str  # in data/raw, and perhaps on a mirror
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus, and how to find its documents."""

    remotes: tuple[Remote, ...]
    licence: str
    separator: str | None = None  # the text between two documents; None = a file is one document
    document_start: str | None = None  # regular expression for the first line of a document
    splits: Mapping[str, str] = field(default_factory=dict)  # file -> official split; other files are left out
    extract: Callable[[bytes, str], bytes] | None = None  # (a whole file, its name) -> its text


def gutenberg_text(book: bytes, name: str) -> bytes:
    """The book between Project Gutenberg's header and licence.  Raises UserError where their markers are missing."""
    marker = rb"^\*\*\* ?%b (?:OF )?TH(?:E|IS) PROJECT GUTENBERG[^*]*\*\*\*"
    start = re.search(marker % b"START", book, re.MULTILINE)
    end = re.search(marker % b"END", book, re.MULTILINE)
    if not start or not end or end.start() < start.end():
        raise UserError(
            f"{name} lacks Project Gutenberg's START and END lines: set download.source to its URL to use all of it"
        )
    return book[start.end() : end.start()].strip(b"\r\n") + b"\n"


def _wikitext(name: str) -> Source:
    archive = f"{name}-raw-v1.zip"
    return Source(
        remotes=(Remote(url=f"https://wikitext.smerity.com/{archive}", name=archive),),
        licence="CC-BY-SA-3.0",
        document_start=r" = [^=\n].* = $",  # an article's title; its sections begin with " = = "
        splits={"wiki.train.raw": "train", "wiki.valid.raw": "val", "wiki.test.raw": "test"},
    )


# The revision of 2024-08-12, so that the address always means the same bytes.
_TINYSTORIES = (
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-{}.txt"
)

EMBEDDED = Source(remotes=(), licence="PSF-2.0")  # its text comes with Python
LOCAL = Source(remotes=(), licence="unknown")

SOURCES = {
    "python-docs": EMBEDDED,
    "tinyshakespeare": Source(
        remotes=(
            Remote(
                url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                name="tinyshakespeare.txt",
                sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
        licence="public domain",
    ),
    "wikitext-2": _wikitext("wikitext-2"),
    "wikitext-103": _wikitext("wikitext-103"),
    "tinystories": Source(
        remotes=tuple(
            Remote(url=_TINYSTORIES.format(part), name=f"TinyStoriesV2-GPT4-{part}.txt") for part in ("train", "valid")
        ),
        licence="CDLA-Sharing-1.0",
        separator="<|endoftext|>",
        splits={"TinyStoriesV2-GPT4-train.txt": "train", "TinyStoriesV2-GPT4-valid.txt": "val"},
    ),
}
SIZES = {"tiny": "tinyshakespeare", "small": "wikitext-2", "medium": "wikitext-103"}  # sources by size
SOURCES |= {size: SOURCES[name] for size, name in SIZES.items()}


def find_source(name: str) -> Source:
    """The source that `download.source` names; LOCAL for local files and the addresses of buckets.

    Raises UserError for an invalid Gutenberg number or an incomplete address.
    """
    if name in SOURCES:
        return SOURCES[name]
    if name.startswith("gutenberg:"):
        return _gutenberg(name.removeprefix("gutenberg:"))
    if name.lower().startswith(("http://", "https://")):
        return _url(name)
    return LOCAL


def _gutenberg(number: str) -> Source:
    if not re.fullmatch("[1-9][0-9]{0,9}", number):
        raise UserError(f"download.source=gutenberg:{number} must give a book's number, such as gutenberg:1342")
    url = f"https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
    return Source(
        remotes=(Remote(url=url, name=f"pg{number}.txt"),),
        licence="public domain in the USA",
        extract=gutenberg_text,
    )


def _url(url: str) -> Source:
    try:
        parts = urlsplit(url)
        name = PurePosixPath(unquote(parts.path)).name if parts.hostname and parts.port != 0 else ""
    except ValueError:  # "http://[::1/x", a port that is not a number
        name = ""
    is_name = name not in ("", ".", "..") and not re.search("[\0-\x1f\x7f]", name)
    is_name = is_name and len(name.encode("utf-8", "replace")) <= MOST_NAME
    require((is_name, f"download.source={url} must have a host and end with a file name of at most {MOST_NAME} bytes"))
    return Source(remotes=(Remote(url=url, name=name),), licence="unknown")


# Left out: what is not the standard library, its tests, and the parts that some installations come without.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "distutils"}
SKIPPED |= {"lib2to3", "ensurepip", "pydoc_data", "__pycache__"}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def iter_python_docs(stdlib: Path | None = None) -> Iterator[str]:
    """One document per module, sorted by name, then one per topic of `help("topics")`.

    Raises UserError when the sources of the standard library are not installed.
    """
    topics: dict[str, str] = {}
    with suppress(ImportError):  # some installations come without it
        from pydoc_data import topics as module  # a large one

        topics = module.topics
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    paths = dict(_modules(stdlib))
    if not paths:
        raise UserError(
            "download.source=python-docs needs the sources of Python's standard library: take another Python"
        )
    for name in sorted(paths):
        if document := _module_document(name, paths[name]):
            yield document
    yield from (topics[name].strip("\n") + "\n" for name in sorted(topics))


def _modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module that can be imported, except those in SKIPPED."""
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED]
        parts = Path(folder).relative_to(stdlib).parts
        for file in files:
            stem, _, ending = file.partition(".")
            if ending == "py" and stem.isidentifier():
                yield ".".join(parts if stem == "__init__" else (*parts, stem)), Path(folder, file)


def _module_document(name: str, path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a file for another version of Python
        return ""
    own = ast.get_docstring(tree)
    parts = [f"module {name}\n\n{own}"] if own else []
    parts += [f"{heading}\n\n{docstring}" for heading, docstring in _definitions(tree, name)]
    return "\n\n\n".join(parts) + "\n" if parts else ""


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of each class and function with a docstring, in source order, but none inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            if docstring := ast.get_docstring(child):
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
