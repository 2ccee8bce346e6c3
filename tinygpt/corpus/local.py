"""Which files a folder or a glob names: the same rules hold for both, and archive.py applies them too.

Hidden files and folders are left out, and so is whatever cannot be read or is not a file. A link is followed, unless
it is broken or leads to a folder that has been read already.
"""

import glob
import itertools
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tinygpt.corpus.sources import MOST_NAME, SOURCES
from tinygpt.errors import UserError, printable, shown
from tinygpt.params import nearest

MOST_SHOWN = 3  # names listed for one reason
LEFT_OUT, READ = "left out", "read"

Note = Callable[[str, str, str], None]  # (LEFT_OUT or READ, why or how, a file's name)


class Notes:
    """Names of files, by what was done with them and why."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, list[str]]] = {}

    def add(self, what: str, why: str, name: str) -> None:
        """Note one file."""
        self.names.setdefault(what, defaultdict(list))[why].append(printable(name[:MOST_NAME]))

    def __str__(self) -> str:
        """`left out: 2 hidden (.git, a/.b); read: 1 as JSON lines (a.json)`, or nothing."""

        def counted(why: str, names: list[str]) -> str:
            more = ", …" if len(names) > MOST_SHOWN else ""
            return f"{len(names):,} {why} ({', '.join(names[:MOST_SHOWN])}{more})"

        parts = ((what, [counted(*kind) for kind in kinds.items()]) for what, kinds in self.names.items())
        return "; ".join(f"{what}: {', '.join(kinds)}" for what, kinds in parts)


def local_files(source: str, root: Path, raw: Path, note: Note) -> list[tuple[str, Path]]:
    """(name, path) of each file, sorted by name; the name is relative to the folder or to the glob's fixed part."""
    named = Path(os.path.expanduser(source))  # noqa: PTH111 (it leaves an unknown ~user as it is)
    path = root / named
    if path.is_file():
        return [(path.name, path)]
    base = path
    pattern: Sequence[str] = ("**",)
    if not path.is_dir():
        if not glob.has_magic(source):
            raise UserError(
                f"download.source={source} is neither a known source (docs/data.md) nor a file or folder: "
                f"looked for {path}" + nearest(source, [*SOURCES, "gutenberg:<id>"])
            )
        base = root.joinpath(*itertools.takewhile(lambda part: not glob.has_magic(part), named.parts))
        pattern = path.relative_to(base).parts
    try:
        within, real = raw.resolve(), base.resolve()
    except (ValueError, RuntimeError) as error:  # a zero byte; links that go in a circle
        raise UserError(f"download.source={shown(source)} names no file or folder ({error})") from None
    if within.is_relative_to(real) and _fits(within.relative_to(real).parts, pattern, whole=False):
        raise UserError(f"download.source={source} holds {raw} itself: put the texts into a folder of their own")
    return [(name, base / name) for name in sorted(_walk(base, pattern, {within}, note))]


def _walk(base: Path, pattern: Sequence[str], read: set[Path], note: Note) -> list[str]:
    """Names, relative to `base`, of the files that match; folders in `read` are not read again."""
    found: list[str] = []
    todo: deque[tuple[str, ...]] = deque([()])  # folders to read; links to folders are at its left end, for last
    while todo:
        parts = todo.pop()
        here = base.joinpath(*parts)
        real = here.resolve()
        if real in read or (parts and base.resolve().is_relative_to(real)):
            note(LEFT_OUT, "links", str(Path(*parts)))
            continue
        read.add(real)
        try:
            names = sorted(os.listdir(here))
        except OSError:
            note(LEFT_OUT, "unreadable", str(Path(*parts)))
            continue
        for name in names:
            inner, path = (*parts, name), here / name
            leads_on, fits = (_fits(inner, pattern, whole=whole) for whole in (False, True))
            kind = _kind(path) if leads_on or fits else ""
            is_inside = kind == "folders" and leads_on
            if not is_inside and not fits:
                continue
            if name.startswith("."):
                note(LEFT_OUT, "hidden", str(Path(*inner)))
            elif is_inside:
                (todo.appendleft if path.is_symlink() else todo.append)(inner)
            elif kind == "files":
                found.append(str(Path(*inner)))
            else:
                note(LEFT_OUT, kind, str(Path(*inner)))
    return found


def _kind(path: Path) -> str:
    try:
        if path.is_dir():
            return "folders"
        if not path.is_file():
            return "links" if path.is_symlink() else "special files"
        with open(path, "rb"):
            return "files"
    except OSError:
        return "unreadable"


def _fits(parts: Sequence[str], pattern: Sequence[str], *, whole: bool) -> bool:
    """Whether the pattern matches a path of these parts or, if not `whole`, may match something in that folder."""
    if not parts:
        return all(part == "**" for part in pattern) if whole else bool(pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return _fits(parts, pattern[1:], whole=whole) or _fits(parts[1:], pattern, whole=whole)
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:], whole=whole)
