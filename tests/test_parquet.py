"""Parquet files as a source."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_sources import fill, texts

from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError

TEXTS = [f"document {i}\n" * (i % 3) for i in range(2500)]


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_the_column_text_becomes_documents(tmp_path):
    write(tmp_path / "own/a.parquet", number=[*range(2500)], text=TEXTS)
    write(tmp_path / "own/b.parquet", text=["one", None, "zwölf"])
    fill(tmp_path, "own")
    assert texts(tmp_path) == {
        "a.jsonl": "".join(map(text_line, TEXTS)),
        "b.jsonl": text_line("one") + text_line("zwölf"),
    }


def test_a_part_of_it_is_whole_documents(tmp_path):
    write(tmp_path / "x.parquet", text=["12345", "12345", "12345"])
    fill(tmp_path, "x.parquet", max_bytes=11)
    assert texts(tmp_path) == {"x.jsonl": text_line("12345") * 2}


def test_a_file_without_texts_is_reported(tmp_path):
    write(tmp_path / "x.parquet", content=["a"])
    with pytest.raises(UserError, match=r"x.parquet needs a column `text` of strings, found none"):
        fill(tmp_path, "x.parquet")
    write(tmp_path / "x.parquet", text=[1])
    with pytest.raises(UserError, match=r"x.parquet needs a column `text` of strings, found type int64"):
        fill(tmp_path, "x.parquet")


@pytest.mark.parametrize("size", [3, 100, 2000])
def test_a_damaged_file_is_reported_by_name(tmp_path, size):
    path = write(tmp_path / "x.parquet", text=TEXTS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"x.parquet is damaged or cut off"):
        fill(tmp_path, "x.parquet")
