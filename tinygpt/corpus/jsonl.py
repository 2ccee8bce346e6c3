"""JSON lines: {"text": …} in each, and whatever else, which nobody reads."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, AnyStr

from tinygpt.errors import UserError
from tinygpt.files import human_bytes

MOST_LINE = 64 << 20  # bytes: to read a line takes up to nine times its size
DECODER = json.JSONDecoder(parse_int=float)  # int() refuses numbers of thousands of digits


def lines(chunks: Iterable[AnyStr], newline: AnyStr, most: int) -> Iterator[AnyStr]:
    """Lines with their ends, which `newline` alone is; one of more than `most` and a chunk comes in several parts."""
    begun: list[AnyStr] = []
    for chunk in chunks:
        parts = chunk.split(newline)
        for line in parts[:-1]:
            yield newline[:0].join(begun) + line + newline
            begun = []
        begun.append(parts[-1])
        if sum(map(len, begun)) > most:
            yield newline[:0].join(begun)
            begun = []
    if any(begun):
        yield newline[:0].join(begun)


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object in a line, None where there is none; bytes that are not UTF-8 become half characters (surrogates)."""
    try:
        found = DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def line_text(line: bytes) -> str | None:
    """The text in a line, None where there is none."""
    text = (json_object(line) or {}).get("text")
    return text if isinstance(text, str) else None


def bad_line(name: str, number: int, line: bytes) -> UserError:
    """The error for a line without a text."""
    where = f"{name} line {number:,}"
    if len(line) > MOST_LINE:
        return UserError(f"{where} has more than {human_bytes(MOST_LINE)}: cut its text into several lines")
    return UserError(f'{where} is not a JSON object with a "text", or is nested too deep: mend the source or rename it')
