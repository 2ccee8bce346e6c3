"""Texts in a file, one {"text": …} a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.encoder import encode_basestring
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.files import must_exist
from tinygpt.shards import Shard


def text_line(text: str) -> str:
    """The line that stands for `text`, as json.dumps(…, ensure_ascii=False) writes it but without its overhead."""
    return f'{{"text": {encode_basestring(text)}}}\n'


def iter_texts(path: Path, *, begin: int = 0, end: int | None = None, stage: str = "clean") -> Iterator[str]:
    """The texts of a file that `stage` wrote, one at a time: those whose lines begin in bytes [begin, end).

    Raises UserError naming the place that is no document.
    """
    with open(must_exist(path, stage=stage), "rb") as file:  # bytes: only "\n" ends a line there
        file.seek(begin)
        while (end is None or begin < end) and (line := file.readline()):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path} byte {begin:,} begins no {{"text": …}} document: run `dvc repro {stage}`')
            yield text
            begin += len(line)


def shard_texts(shard: Shard) -> Iterator[str]:
    """The texts of a shard of such files, no more characters of them than the shard has bytes.

    That cuts a text only where `thin` has cut the shard.
    """
    for span in shard.spans:
        room = span.size
        for text in iter_texts(span.path, begin=span.begin, end=span.end):
            yield text[:room]
            room = max(0, room - len(text))
