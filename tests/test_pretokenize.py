"""Pretokens found by array arithmetic equal those of the regex; their tables and counts are exact."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import TRICKY, prose
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.corpus.folders import cut_lines, text_line
from tinygpt.tokenizer import pretokenize
from tinygpt.tokenizer.kinds import save_counts, sum_counts
from tinygpt.tokenizer.pretokenize import (
    DOCUMENT_BORDER,
    PATTERN,
    PretokenTable,
    count_pretokens,
    iter_blocks,
    pretoken_starts,
)

LETTERS = list(" \n\t  ''''srtvemldSabZ12½Ⅷ.,!-é中文ß\u00a0\u3000\u2028\u200d😀\u0301\x00\x1c\u0085")


def by_regex(texts: list[str]) -> list[bytes]:
    return [pretoken.encode() for text in texts for pretoken in PATTERN.findall(text)]


def by_arrays(texts: list[str]) -> list[bytes]:
    found = []
    for block in iter_blocks(texts):
        starts = pretoken_starts(block).tolist()
        found += [block[begin:end] for begin, end in pairwise(starts)]
    return [pretoken for pretoken in found if pretoken != DOCUMENT_BORDER]


def test_arrays_find_the_pretokens_of_the_regex_in_many_short_texts():
    rng = random.Random(0)
    texts = ["".join(rng.choices(LETTERS, k=rng.randint(0, 14))) for _ in range(100_000)]
    assert by_arrays(texts) == by_regex(texts)


def test_arrays_know_the_class_of_every_character():
    every = "".join(f"a{chr(i)}" for i in [*range(0xD800), *range(0xE000, 0x110000)])
    assert by_arrays([every]) == by_regex([every])


def test_a_long_text_is_cut_where_a_pretoken_begins(monkeypatch):
    monkeypatch.setattr(pretokenize, "BLOCK_BYTES", 100)
    texts = [prose(200), "", " \n " + prose(30) + "\n  ", "x" * 250, "\n " * 200]
    assert len([*iter_blocks(texts)]) > 10
    assert by_arrays(texts) == by_regex(texts)
    assert b"".join(iter_blocks(texts)) == b"".join(DOCUMENT_BORDER + text.encode() for text in texts)


@given(texts=st.lists(TRICKY, max_size=4))
@settings(max_examples=200)
def test_wherever_a_text_is_cut_its_pretokens_stay(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenize, "BLOCK_BYTES", 1)
        assert by_arrays(texts) == by_regex(texts)


@given(texts=st.lists(TRICKY, max_size=4))
@settings(max_examples=100)
def test_pretokens_are_numbered_and_counted(texts):
    table = PretokenTable()
    numbers = [int(i) for block in iter_blocks(texts) for i in table.number(block)]
    assert len(set(table.pretokens)) == len(table.pretokens)
    assert [table.pretokens[i] for i in numbers if table.pretokens[i] != DOCUMENT_BORDER] == by_regex(texts)
    assert count_pretokens(texts) == Counter(by_regex(texts))


@pytest.mark.parametrize("factors", [[0, 0], [2**63, 2**63]], ids=["all alike", "two values"])
def test_numbers_stay_exact_when_every_hash_collides(monkeypatch, factors):
    monkeypatch.setattr(pretokenize, "FACTORS", np.array(factors, np.uint64))
    texts = [prose(100), "0 00 000 0000000 00000000 000000000 \0 \0\0\0 0000000000000000 00000000000000000"]
    assert count_pretokens(texts) == Counter(by_regex(texts))


def test_counts_of_several_files_are_added(tmp_path):
    texts = [prose(100, seed=1), prose(100, seed=2), ""]
    for i, text in enumerate(texts):
        (tmp_path / "text.jsonl").write_text(text_line(text))
        save_counts(*cut_lines(tmp_path / "text.jsonl"), tmp_path / str(i))
    assert sum_counts([tmp_path / str(i) for i in range(len(texts))]) == count_pretokens(texts)
    assert sum_counts([]) == Counter()
