"""Which tokens a step sees: the context warmup, shuffled documents."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.train import batches as batches_module
from tinygpt.train.batches import Batches, document_starts, seq_len_at
from tinygpt.train.config import ContextWarmup

EOS = 0


def row_of(lengths: list[int]) -> np.ndarray:
    """Documents with these numbers of tokens, all of them different, with EOS before and after each document."""
    ids = iter(range(1, sum(lengths) + 1))
    return np.array([*(id for n in lengths for id in (EOS, *(next(ids) for _ in range(n)))), EOS], np.uint32)


@st.composite
def contexts(draw, *, odd: int, doublings: int):
    """A sequence length, and a warmup to it or None."""
    start, n = draw(st.integers(1, odd)), draw(st.integers(0, doublings))
    return start << n, ContextWarmup(start=start, steps=draw(st.integers(1, 12))) if n else None


# ---- the warmup ----


def test_sequences_are_doubled_at_even_intervals():
    warmup = ContextWarmup(start=2, steps=10)
    assert [seq_len_at(step, 8, warmup) for step in (0, 4, 5, 9, 10, 99)] == [2, 2, 4, 4, 8, 8]
    assert seq_len_at(3, 8, None) == 8


@given(contexts(odd=9, doublings=6))
def test_sequences_grow_to_their_full_length_in_few_lengths(context):
    full, warmup = context
    lengths = [seq_len_at(step, full, warmup) for step in range(13)]
    assert lengths == sorted(lengths) and lengths[-1] == full
    assert len(set(lengths)) <= (full // warmup.start).bit_length() if warmup else set(lengths) == {full}


# ---- the tokens of an epoch ----


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    batch_size=st.integers(1, 12),
    context=contexts(odd=3, doublings=3),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
@settings(max_examples=200)
def test_a_warmup_and_shuffled_documents_leave_each_token_a_target_once_an_epoch(
    lengths, batch_size, context, seed, shuffle
):
    row, (seq_len, context_warmup) = row_of(lengths), context
    if len(row) <= seq_len:
        row = row_of([*lengths, seq_len])
    batches = Batches(
        row,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        context_warmup=context_warmup,
        shuffle_documents=shuffle,
    )
    size, inputs, targets = batches.per_epoch * seq_len, [], []
    for step in range(100):
        rows = batches.batch_at(step)
        assert rows.shape[1] == seq_len_at(step, seq_len, context_warmup) + 1
        inputs += rows[:, :-1].flatten().tolist()
        targets += rows[:, 1:].flatten().tolist()
        assert rows[:, 1:].size == batch_size * seq_len
        if len(targets) >= 2 * size:
            break
    for epoch in range(len(targets) // size):
        counts = Counter(targets[epoch * size : (epoch + 1) * size])
        assert counts[EOS] <= row.tolist().count(EOS) - 1
        assert all(n == 1 for id, n in counts.items() if id != EOS)
        assert batches.ring - counts.total() < seq_len
    follows = dict(zip(row[:-1].tolist(), row[1:].tolist(), strict=True))
    begins = {after for before, after in zip(row[:-1].tolist(), row[1:].tolist(), strict=True) if before == EOS}
    for before, after in zip(inputs, targets, strict=True):
        assert after in begins if before == EOS else after == follows[before]


def test_each_epoch_cuts_the_ring_elsewhere_and_takes_its_sequences_in_random_order():
    batches = Batches(row_of([400]), seq_len=4, batch_size=100, seed=1)
    first, second = (batches.batch_at(step)[:, 0].tolist() for step in range(2))
    assert set(first) != set(second)
    assert sum(after - before == 4 for before, after in pairwise(first)) < 10
    others = Batches(row_of([400]), seq_len=4, batch_size=100, seed=2)
    assert set(second) != set(others.batch_at(0)[:, 0].tolist())  # a neighbouring seed shares no epoch


def test_a_context_warmup_changes_no_token_of_a_step():
    row, warmup = row_of([50] * 20), ContextWarmup(start=4, steps=9)
    plain = Batches(row, seq_len=32, batch_size=3, seed=1)
    short = Batches(row, seq_len=32, batch_size=3, seed=1, context_warmup=warmup)
    shapes = []
    for step in range(12):
        a, b = plain.batch_at(step), short.batch_at(step)
        shapes.append(b.shape)
        assert (a[:, 1:].flatten() == b[:, 1:].flatten()).all()
        assert (a[:, :-1].flatten() == b[:, :-1].flatten()).all()
    assert shapes == [(24, 5)] * 3 + [(12, 9)] * 3 + [(6, 17)] * 3 + [(3, 33)] * 3


def test_any_step_has_the_same_batch_at_once_as_after_the_steps_before():
    def make(seed: int = 1) -> Batches:
        return Batches(
            row_of([7, 30, 0, 12, 40] * 5),
            seq_len=16,
            batch_size=8,
            seed=seed,
            context_warmup=ContextWarmup(start=2, steps=15),
            shuffle_documents=True,
        )

    once = make()
    forward = [once.batch_at(step) for step in range(60)]
    for step in (59, 3, 17, 40, 0):
        assert (make().batch_at(step) == forward[step]).all()
        assert (once.batch_at(step) == forward[step]).all()
    assert (make(2).batch_at(59) != forward[59]).any()


# ---- documents ----


def documents_in(ring: list[int]) -> list[tuple[int, ...]]:
    """The documents of a ring of ids, wherever it is cut open."""
    at = ring.index(EOS)
    ids = [*ring[at:], *ring[:at], EOS]
    borders = [place for place, id in enumerate(ids) if id == EOS]
    return [tuple(ids[a + 1 : b]) for a, b in pairwise(borders)]


def rings(row: np.ndarray, n: int, *, shuffle: bool) -> list[list[tuple[int, ...]]]:
    """The documents of each of n epochs, in order."""
    ring = len(row) - 1
    batches = Batches(row, seq_len=ring, batch_size=1, seed=1, shuffle_documents=shuffle)
    return [documents_in(batches.batch_at(step)[0, :-1].tolist()) for step in range(n)]


def rotated(items: list) -> list:
    at = items.index(min(items))
    return items[at:] + items[:at]


def test_each_epoch_has_all_documents_whole_in_an_order_of_its_own():
    row = row_of([3, 9, 1, 5, 20, 2, 8])
    in_file = documents_in(row[:-1].tolist())
    for documents in rings(row, 5, shuffle=False):
        assert rotated(documents) == rotated(in_file)
    shuffled = rings(row, 5, shuffle=True)
    assert all(sorted(documents) == sorted(in_file) for documents in shuffled)
    assert len({tuple(rotated(documents)) for documents in shuffled}) == 5


def test_more_documents_than_fit_are_shuffled_in_groups_of_neighbours(monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_GROUPS", 4)
    row = row_of([1] * 14)  # four groups: 4, 4, 4 and 2 documents
    groups = [{(i,) for i in ids} for ids in ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14))]
    orders = set()
    for documents in rings(row, 6, shuffle=True):
        neighbours = list(zip(documents, [*documents[1:], documents[0]], strict=True))
        for group in groups:
            assert sum({a, b} <= group for a, b in neighbours) == len(group) - 1
        orders.add(tuple(rotated(documents)))
    assert len(orders) > 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 20))
def test_starts_of_documents_are_found_piece_by_piece(lengths, at_most, piece):
    row = row_of(lengths)
    expected = np.flatnonzero(row[:-1] == EOS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "PIECE", piece)
        found = document_starts(row, at_most=at_most)
    assert len(found) <= at_most
    assert found.tolist() == expected[:: -(-len(expected) // at_most)].tolist()
