"""Merging bytes into tokens gives the same result for one row, many rows at once, and very long ones."""

import random
import string
from itertools import pairwise

import numpy as np
import pytest
from conftest import prose
from hypothesis import example, given
from hypothesis import strategies as st

from tinygpt.errors import UserError
from tinygpt.tokenizer import merger
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR
from tinygpt.tokenizer.merger import ROW_END, TOGETHER, Merger, Pairs

# Pairs of ids in rank order.  The merged id may exist already, as there may be several ways to one token.
MERGES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(4, 9)), max_size=8)
BYTE_IDS = [*range(4), *range(1000, 1252)]


def slowly(ids: list[int], merges: list[tuple[int, int, int]]) -> list[int]:
    """Merge by searching for the pair of lowest rank each time."""
    ranks = {(left, right): (rank, merged) for rank, (left, right, merged) in enumerate(merges)}
    while found := [(*ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]:
        _, merged, i = min(found)
        ids = [*ids[:i], merged, *ids[i + 2 :]]
    return ids


@pytest.mark.parametrize("together", [TOGETHER, 0], ids=["many at once", "each alone"])
@given(rows=st.lists(st.binary(min_size=1, max_size=69), max_size=30), merges=MERGES)
@example(rows=[bytes([0, 0, 0, 1, 0, 0, 1])], merges=[(1, 0, 4), (0, 0, 5), (5, 5, 6), (4, 0, 5)])
def test_rows_are_merged_as_by_looking_for_the_lowest_rank_each_time(together, rows, merges):
    rows = [bytes(byte % 4 for byte in row) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merger, "TOGETHER", together)
        ids, lengths = Merger(BYTE_IDS, merges).merge_all(rows)
    assert lengths.tolist() == [len(slowly([*row], merges)) for row in rows]
    assert ids.tolist() == [i for row in rows for i in slowly([*row], merges)]


def test_the_merges_of_a_trained_tokenizer_give_the_same_in_both_ways(tiny_tokenizer):
    rng = random.Random(0)
    long = ["".join(rng.choices("the fil" + string.ascii_lowercase, k=TOGETHER + n)).encode() for n in (0, 1, 500)]
    rows = [word.encode() for word in prose(300).split()] + [b"a" * 70, "ÿ中😀".encode() * 30, *long]
    of = {token: i for i, token in enumerate(tiny_tokenizer.tokens)}
    merges = [(of[left], of[right], of[left + right]) for left, right in tiny_tokenizer.merges]
    ids, lengths = tiny_tokenizer.merger.merge_all(rows)
    assert ids.tolist() == [i for row in rows for i in slowly([of[BYTE_TO_CHAR[byte]] for byte in row], merges)]
    assert len(lengths) == len(rows)


@pytest.mark.parametrize("text", ["a" * 3_000_000, "the" * 400_000], ids=["one letter", "without a space"])
def test_a_word_of_megabytes_takes_seconds(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert ids[10:1000] == tiny_tokenizer.encode(text[:100_000])[10:1000]


def test_more_than_can_be_numbered_is_refused():
    ids = np.array([2**30, 2**30, ROW_END], np.int32)
    with pytest.raises(UserError, match=r"lower tokenizer.max_bytes or tokenizer.vocab_size"):
        Pairs(ids, np.zeros(3, np.int32), np.ones(1, np.int64))
