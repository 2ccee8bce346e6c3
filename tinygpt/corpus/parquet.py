"""Texts of a Parquet file (https://parquet.apache.org/docs/file-format/) as lines of {"text": …}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinygpt.corpus.jsonl import text_line
from tinygpt.errors import UserError

ROWS = 1000  # read at a time, so that memory does not grow with the file


def iter_parquet_lines(path: Path, name: str) -> Iterator[bytes]:
    """The column `text`, some rows at a time; rows without a text are left out.

    Raises UserError where pyarrow is missing, the file is damaged, or has no such column of texts.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            kind = {field.name: str(field.type) for field in file.schema_arrow}.get("text")
            if kind not in ("string", "large_string"):
                found = "none" if kind is None else f"one of {kind}"
                raise UserError(f"{name} needs a column `text` of strings and has {found}")
            for batch in file.iter_batches(ROWS, columns=["text"]):
                yield "".join(text_line(text) for text in batch.column("text").to_pylist() if text is not None).encode()
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{name} is damaged or cut off ({' '.join(str(error).split())}): delete it, get it again"
        ) from None
