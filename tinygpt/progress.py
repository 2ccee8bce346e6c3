"""A progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

from tinygpt.errors import printable

MOST_LETTERS = 200  # of a sample that a log shows between its lines
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} elapsed, {remaining} remaining"
LINE_EVERY_S = 10.0  # seconds between two lines where the output is not a terminal


class _Lines:
    """A text stream that ends each redraw of a bar with a newline instead of returning to the line's start."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip("\n ")
        if text and text != self.last:
            self.stream.write(text + "\n")
            self.last = text

    def flush(self) -> None:
        self.stream.flush()


def progress(
    description: str, *, total: float | None = None, unit: str, start: int = 0, lines: bool = True
) -> tqdm[Any]:
    """A tqdm bar on stderr; use it as a context manager and call `.update(n)`.

    A `unit` of "B" counts bytes. Outside a terminal, work of less than a second shows nothing, and without `lines` no
    work does: that is for work with a log of its own.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        initial=start,
        disable=not (terminal or lines),
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else LINE_EVERY_S,
        delay=0 if terminal else 1.0,
        dynamic_ncols=terminal,
        leave=not terminal,
        bar_format=None if terminal else LINE,
    )


def shortened(text: str) -> str:
    """The beginning of a text, indented, as lines that a terminal prints without obeying them."""
    return "\n".join(f"    {printable(line)}" for line in text[:MOST_LETTERS].strip("\n").splitlines())
