"""Texts in a file, one {"text": …} a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.files import must_exist


def text_line(text: str) -> str:
    """The line that stands for `text`, as json.dumps(…, ensure_ascii=False) writes it but without its overhead."""
    return f'{{"text": {encode_basestring(text)}}}\n'


def iter_texts(
    path: Path, *, stage: str = "clean", on_bytes: Callable[[int], object] = lambda n: None
) -> Iterator[str]:
    """The texts of a file that `stage` wrote, one at a time; `on_bytes` hears the size of each line.

    Raises UserError naming the line that is no document.
    """
    with open(must_exist(path, stage=stage), "rb") as file:  # bytes: only "\n" ends a line there
        for number, line in enumerate(file, 1):
            on_bytes(len(line))
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path} line {number} is no {{"text": …}} document: run `dvc repro {stage}`')
            yield text
