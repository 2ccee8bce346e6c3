"""Where raw files can be cut so that their parts, read one by one, give the documents of the whole."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

from tinygpt.corpus.documents import Reader
from tinygpt.corpus.raw import RawFile
from tinygpt.shards import Shard, Span, join_spans, line_ends, shard_bytes


def raw_shards(reader: Reader, files: Sequence[RawFile]) -> Iterator[tuple[Shard, str | None]]:
    """The files in shards, in order, each with the official split of its files."""
    n_bytes = shard_bytes(sum(file.bytes for file in files))
    for split, group in groupby(files, lambda file: file.split):
        spans = (span for file in group for span in _cut(reader, reader.folder / file.name, n_bytes))
        yield from ((shard, split) for shard in join_spans(spans, n_bytes))


def _cut(reader: Reader, path: Path, n_bytes: int) -> Iterator[Span]:
    """A file in spans of about `n_bytes`; in one where its documents give no place to cut."""
    size = path.stat().st_size
    if size <= n_bytes:
        ends: Iterator[int] = iter([size])
    elif path.name.lower().endswith(".jsonl"):
        ends = line_ends(path, n_bytes)
    elif reader.start:
        ends = _starts(path, n_bytes, reader.start, newlines=reader.newlines)
    elif reader.separator:
        ends = _separators(path, n_bytes, reader.separator, newlines=reader.newlines)
    else:
        ends = iter([size])
    return (Span(path, begin, end) for begin, end in pairwise([0, *ends]))


def _starts(path: Path, n_bytes: int, start: re.Pattern[str], *, newlines: bool) -> Iterator[int]:
    """Where a line begins a document, each at least `n_bytes` behind the one before; and the end."""
    last = 0
    with open(path, "rb") as file:
        for end in line_ends(path, n_bytes):
            file.seek(max(end, last))
            while (line := file.readline()) and not start.match(_first_line(line) if newlines else _decoded(line)):
                pass
            end = file.tell() - len(line)
            if end > last and (last or not line or not _is_blank(path, end)):  # white space before the first is its
                yield end
                last = end


def _first_line(line: bytes) -> str:
    r"""The line as the reader sees it; one that only "\r" ends is cut there."""
    return re.split("\r\n|\r|\n", _decoded(line), maxsplit=1)[0] + "\n"


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _is_blank(path: Path, end: int) -> bool:
    with open(path, "rb") as file:
        return not _decoded(file.read(end)).strip()


def _separators(path: Path, n_bytes: int, separator: str, *, newlines: bool) -> Iterator[int]:
    """Where a separator ends, each at least `n_bytes` behind the one before; and the end."""
    sought = separator.encode()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        last = end = 0
        differs = newlines and re.search("[\r\n]", separator) and whole.find(b"\r") >= 0  # these bytes from that text
        while not differs and (found := whole.find(sought, end)) >= 0:  # one by one: they may overlap, as "\n\n" does
            end = found + len(sought)
            if end - last >= n_bytes:
                yield end
                last = end
        if last < len(whole):
            yield len(whole)
