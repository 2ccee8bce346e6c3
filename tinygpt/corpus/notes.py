"""What is said of a source's files: which were left out and why, and which are not what their names promise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from tinygpt.errors import printable

MOST_NAME = 255  # characters
MOST_TOLD = 3  # names of a kind
LEFT_OUT, READ = "left out", "read"

Tell = Callable[[str, str, str], None]  # takes LEFT_OUT or READ, why or how, and a file's name


class Notes:
    """Names of files, by what was done with them and why."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, list[str]]] = {}

    def add(self, what: str, why: str, name: str) -> None:
        """Note one file."""
        self.names.setdefault(what, defaultdict(list))[why].append(printable(name[:MOST_NAME]))

    def __str__(self) -> str:
        """`left out: 2 hidden (.git, a/.b); read: 1 as JSON lines (a.json)`, or nothing."""
        return "; ".join(
            f"{what}: {', '.join(_counted(why, names) for why, names in kinds.items())}"
            for what, kinds in self.names.items()
        )


def _counted(why: str, names: list[str]) -> str:
    more = ", …" if len(names) > MOST_TOLD else ""
    return f"{len(names):,} {why} ({', '.join(names[:MOST_TOLD])}{more})"
