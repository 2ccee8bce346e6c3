"""Each of several rows that are decoded together has the logits that it has alone."""

import pytest
import torch
from conftest import FAMILIES, random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import UserError
from tinygpt.generate.decoder import Decoder, slot_mask
from tinygpt.model import layers

MODEL = tiny_model(block_size=16)
WINDOWED = {"window": {"window": 5}, "window_and_full": {"window": 5, "full_every": 2}}


def read_whole(model, ids: list[int]) -> torch.Tensor:
    """The logits after some ids, without a cache."""
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0, -1]


def rest_after_slide(ids: list[int], n_prompt: int, block_size: int) -> list[int]:
    """The ids that a row still sees: the prompt's end, and whenever the context is full, its newer half."""
    seen = ids[:n_prompt][-block_size:]
    for i in ids[n_prompt:]:
        seen = [*seen, i] if len(seen) < block_size else [*seen, i][-(block_size // 2 + 1) :]
    return seen


@pytest.mark.parametrize("changes", [*FAMILIES.values(), *WINDOWED.values()], ids=[*FAMILIES, *WINDOWED])
def test_prompts_of_unequal_length_each_have_the_logits_of_reading_them_alone(changes):
    model = tiny_model(**changes)
    rows = [[1], [5, 7, 11, 2, 3, 9, 8], [4, 4, 250], list(range(60))]
    decoder = Decoder(model, rows)
    for step in range(4):
        expected = torch.stack([read_whole(model, ids) for ids in rows])
        torch.testing.assert_close(decoder.logits, expected, atol=1e-4, rtol=1e-4)
        assert decoder.logits.dtype == torch.float32
        added = [(17 * step + 31 * i) % 300 for i in range(len(rows))]
        decoder.step(added)
        rows = [[*ids, i] for ids, i in zip(rows, added, strict=True)]


@settings(max_examples=40)
@given(
    prompts=st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=40), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_steps_and_rows_that_come_and_stay_in_any_order_past_the_end_of_the_context(prompts, data):
    decoder = Decoder(MODEL, prompts)
    rows = [(list(prompt), len(prompt)) for prompt in prompts]
    for _ in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            decoder.keep(kept)
            rows = [(list(rows[i][0]), rows[i][1]) for i in kept]
        if data.draw(st.booleans()):
            joining = data.draw(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=40), max_size=2))
            decoder.join(joining)
            rows += [(list(prompt), len(prompt)) for prompt in joining]
        added = data.draw(st.lists(st.integers(0, 299), min_size=len(rows), max_size=len(rows)))
        decoder.step(added)
        for (ids, _), i in zip(rows, added, strict=True):
            ids.append(i)
    expected = torch.stack([read_whole(MODEL, rest_after_slide(ids, n, 16)) for ids, n in rows])
    torch.testing.assert_close(decoder.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_row_can_be_left_out_and_an_empty_prompt_is_refused():
    decoder = Decoder(MODEL, [[1], [2]])
    decoder.keep([1])
    torch.testing.assert_close(decoder.logits, Decoder(MODEL, [[2]]).logits)
    for refused in (lambda: Decoder(MODEL, [[1], []]), lambda: decoder.join([[]])):
        with pytest.raises(UserError, match="prompt is empty"):
            refused()


ALL = {
    **FAMILIES,
    **WINDOWED,
    "window of one, mqa": {"window": 1, "n_kv_head": 1},
    "gqa": {"n_kv_head": 2, "window": 7},
}


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_several_tokens_in_one_pass_have_the_logits_of_the_model(changes):
    model = tiny_model(**changes)
    for i, ids in enumerate(([1], [5, 7, 11, 2, 3, 9, 8], list(range(40)))):
        decoder = Decoder(model, [ids], room=4)
        for step in range(4):
            new = random_ids((1, 5, 1 + step)[i], seed=step).tolist()
            found, ids = decoder.advance(new), [*ids, *new]
            with torch.inference_mode():
                torch.testing.assert_close(found, model(torch.tensor([ids]))[0, -len(new) :], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(decoder.logits, found[-1:], atol=0, rtol=0)


def test_the_slots_that_a_token_sees_by_hand():
    def seen(at, newest, window):
        mask = slot_mask(torch.tensor([at]), torch.tensor([newest]), torch.arange(4), 4, window, dtype=torch.float32)
        return [slot for slot in range(4) if mask[slot] == 0]

    assert seen(1, 1, None) == [0, 1]
    assert seen(5, 5, None) == [0, 1, 2, 3]  # of the positions 4, 5, 2 and 3
    assert seen(5, 5, 3) == [0, 1, 3]
    assert seen(4, 5, 2) == [0, 3]  # not the later position 5


MODELS = [tiny_model(**{"block_size": 32} | changes) for changes in ALL.values()]


@settings(max_examples=60)
@given(model=st.sampled_from(MODELS), room=st.integers(0, 5), data=st.data())
def test_any_sequence_of_tokens_added_and_taken_back_is_that_of_reading_what_is_left(model, room, data):
    ids_of_v = st.lists(st.integers(0, 299), min_size=1, max_size=room + 1)
    n_prompt = data.draw(st.integers(1, 20))
    ids = random_ids(n_prompt).tolist()
    decoder, longest = Decoder(model, [ids], room=room), n_prompt
    for _ in range(data.draw(st.integers(1, 12))):
        n_back = data.draw(st.integers(0, max(0, min(room - (longest - len(ids)), len(ids) - 1))))
        decoder.back(n_back)
        new = data.draw(ids_of_v)
        ids = [*ids[: len(ids) - n_back], *new]
        if len(new) > decoder.n_free():  # the context is full
            break
        if len(new) == 1 and data.draw(st.booleans()):
            decoder.step(new)
        else:
            decoder.advance(new)
        longest = max(longest, len(ids))
        torch.testing.assert_close(decoder.logits[0], read_whole(model, ids), atol=1e-4, rtol=1e-4)


def all_ways(changes: dict) -> list[torch.Tensor]:
    """The logits of rows that are read, extended, taken back, joined and dropped, and those of the whole model."""
    model = tiny_model(**changes)
    found = []
    for prompt in [5], list(range(20)):
        decoder = Decoder(model, [prompt], room=3)
        found.append(decoder.logits)
        for step in range(12):
            decoder.step([step])
            found += [decoder.logits, decoder.advance([step, 2, 9])]
            decoder.back(2)
    decoder.join([[5]])
    decoder.join([list(range(50)), [3]])
    decoder.keep([3, 0, 2])
    for step in range(30):
        decoder.step([step, 2, step])
        found.append(decoder.logits)
    with torch.inference_mode():
        return [*found, model(random_ids(2, 9)), model(random_ids(2, 61))]


@pytest.mark.parametrize("changes", [*FAMILIES.values(), *WINDOWED.values()], ids=[*FAMILIES, *WINDOWED])
def test_caches_that_grow_with_the_positions_in_use_change_no_bit(changes, monkeypatch):
    at_once = all_ways(changes)
    monkeypatch.setattr(layers, "FIRST_ROOM", 4)
    assert all(map(torch.equal, all_ways(changes), at_once))


@pytest.mark.parametrize("changes", [{}, {"window": 10**7}, {"window": 3, "full_every": 2}])
def test_a_context_of_fifty_million_tokens_takes_memory_for_those_in_use(changes):
    model = tiny_model(block_size=5 * 10**7, **changes)
    decoder = Decoder(model, [random_ids(5000).tolist()])
    assert sum(slots.nbytes for layer in decoder._cache.layers for slots in layer) <= 2 * 2 * 8192 * 32 * 4
    assert sum(table.nbytes for table in model.buffers()) <= 2 * 8192 * 8 * 4
