"""What is said of a source's files: which were left out and why, and which are not what their names promise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

MOST_NAME = 255  # characters
MOST_TOLD = 3  # names of a kind
LEFT_OUT, READ = "left out", "read"

Tell = Callable[[str, str, str], None]  # takes LEFT_OUT or READ, why or how, and a file's name


def plain_name(name: str) -> str:
    r"""A name that every terminal and JSON file takes: what is not UTF-8 or not visible becomes \x1b or the like."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


class Notes:
    """Names of files, by what was done with them and why."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, list[str]]] = {}

    def add(self, what: str, why: str, name: str) -> None:
        """Note one file."""
        self.names.setdefault(what, defaultdict(list))[why].append(plain_name(name[:MOST_NAME]))

    def __str__(self) -> str:
        """`left out: 2 hidden (.git, a/.b); read: 1 as JSON lines (a.json)`, or nothing."""
        return "; ".join(
            f"{what}: {', '.join(_counted(why, names) for why, names in kinds.items())}"
            for what, kinds in self.names.items()
        )


def _counted(why: str, names: list[str]) -> str:
    more = ", …" if len(names) > MOST_TOLD else ""
    return f"{len(names):,} {why} ({', '.join(names[:MOST_TOLD])}{more})"
