"""Texts from Parquet files.  Format: https://parquet.apache.org/docs/file-format/"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError
from tinygpt.files import human_bytes

STRINGS = ("string", "large_string", "string_view")
ROWS = 4  # decoded at a time: with a dictionary a few bytes may stand for each
PAGE_ROWS = 1024  # that a writer puts into a page before it looks at its size
MOST_PAGE_BYTES = 250_000_000  # a page is unpacked whole
BUFFER_BYTES = 1 << 20  # without a buffer all of a row group is read at once


def parquet_lines(path: Path, name: str, afford: Callable[[int], None]) -> Iterator[bytes]:
    """The column `text` as lines of {"text": …}, many at a time; rows without a text are left out.

    `afford` is asked for as many bytes as the file says that it has. Raises UserError where pyarrow is missing, or the
    file has no such column of texts; for a damaged file whatever pyarrow raises.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    with ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        kind = {field.name: field.type for field in file.schema_arrow}.get("text")
        if str(getattr(kind, "value_type", kind)) not in STRINGS:
            found = "none" if kind is None else f"one of {kind}"
            raise UserError(f"{name} needs a column `text` of strings and has {found}")
        _check_sizes(file.metadata, name, afford)
        lines = bytearray()
        for batch in file.iter_batches(ROWS, columns=["text"], use_threads=False):
            column = batch.column("text")
            plain = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            for text in plain.cast(pyarrow.binary()).to_pylist():
                if text is not None:  # bytes that are not UTF-8 stay, for `clean` to count
                    lines += text_line(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
                if len(lines) >= BUFFER_BYTES:
                    yield bytes(lines)
                    lines.clear()
        yield bytes(lines)


def _check_sizes(metadata: Any, name: str, afford: Callable[[int], None]) -> None:
    """Refuse before anything is unpacked what would take more memory than may be used."""
    total = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        page = size // max(1, group.num_rows) * min(PAGE_ROWS, group.num_rows)
        if page > MOST_PAGE_BYTES:
            raise UserError(f"{name} has {human_bytes(page)} in one page: write it in smaller row groups, or as .jsonl")
        total += size
    afford(total)
