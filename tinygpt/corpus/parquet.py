"""Texts from Parquet files, read in another process: on some damaged files pyarrow aborts, or takes all memory.

Format: https://parquet.apache.org/docs/file-format/
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError, program
from tinygpt.files import human_bytes

STRINGS = ("string", "large_string", "string_view")
ROWS = 4  # decoded at a time: with dictionary encoding, a few bytes may stand for a long text
MOST_MEMORY = 1_000_000_000  # bytes; pages are unpacked whole, and a writer may put a thousand rows into each
BUFFER_BYTES = 1 << 20  # without a buffer pyarrow reads all of a row group at once
READER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from tinygpt.corpus.parquet import print_lines; "
    "print_lines(*sys.argv[2:])"
)


def parquet_lines(path: Path, name: str) -> Iterator[bytes]:
    """The column `text` as lines of {"text": …}, in pieces; rows without a text are left out.

    Raises UserError if pyarrow is missing, there is no `text` column of strings, or it takes too much memory; EOFError
    for a damaged file.
    """
    command = [sys.executable, "-c", READER, str(Path(__file__).parents[2]), str(path), name]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as reader:
            assert reader.stdout is not None
            try:
                yield from iter(partial(reader.stdout.read, BUFFER_BYTES), b"")
                status = reader.wait()
            finally:
                reader.kill()  # if the caller has stopped before the end
        if status:
            said.seek(0)
            reason = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            if reason.startswith("error: "):
                raise UserError(reason.removeprefix("error: "))
            raise EOFError(reason or "pyarrow gives no reason")


@program
def print_lines(path: str, name: str) -> None:
    """Print the texts of a file as lines: the work of the other process."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            kind = {field.name: field.type for field in file.schema_arrow}.get("text")
            if str(getattr(kind, "value_type", kind)) not in STRINGS:
                found = "none" if kind is None else f"type {kind}"
                raise UserError(f"{name} needs a column `text` of strings, found {found}")
            for batch in file.iter_batches(ROWS, columns=["text"], use_threads=False):
                column = batch.column("text")
                plain = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
                for text in plain.cast(pyarrow.binary()).to_pylist():
                    if text is not None:  # bytes that are not UTF-8 stay, for `clean` to count
                        line = text_line(text.decode("utf-8", "surrogateescape"))
                        sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape"))
    except MemoryError:
        raise UserError(
            f"{name} needs more than {human_bytes(MOST_MEMORY)} of memory: write smaller row groups, or .jsonl"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        sys.exit(" ".join(str(error).split()))
