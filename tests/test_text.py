"""Streams of text: they never show half a character, or the beginning of a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.generate.answer import TextStream, find_stop, n_held
from tinygpt.tokenizer import Tokenizer

PIECES = ["a", "b", "ab", "ba", "aab", "é", "😀", "abc", "c"]
BYTES = Tokenizer.from_merges([])


class Pieces:
    """A tokenizer whose tokens are whole pieces of text, or bytes."""

    def decode_bytes(self, ids):
        return b"".join(i if isinstance(i, bytes) else PIECES[i].encode() for i in ids)


def pushed(ids, stop, tokenizer) -> list[str]:
    text = TextStream(tokenizer, stop)
    pieces = [text.push(i) for i in ids]
    return [*pieces, text.finish()]


def up_to_stop(text: str, stop) -> str:
    """The text up to the first complete stop text, without it, read character by character."""
    for end in range(1, len(text) + 1):
        if found := [each for each in stop if text[:end].endswith(each)]:
            return text[: end - len(max(found, key=len))]
    return text


@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=30),
    stop=st.lists(st.text("abcé😀", min_size=1, max_size=5), max_size=3),
    in_bytes=st.booleans(),
)
def test_pieces_are_the_text_before_the_first_stop_and_come_as_soon_as_they_can(ids, stop, in_bytes):
    text = "".join(PIECES[i] for i in ids)
    tokens = [bytes([byte]) for byte in text.encode()] if in_bytes else ids
    pieces = pushed(tokens, stop, Pieces())
    expected = up_to_stop(text, stop)
    assert "".join(pieces) == expected
    raw, shown = b"", ""
    for token, piece in zip(tokens, pieces, strict=False):
        raw, shown = raw + Pieces().decode_bytes([token]), shown + piece
        known = up_to_stop(raw.decode(errors="ignore"), stop)
        assert known.startswith(shown)
        if known == raw.decode(errors="ignore"):  # only a possible beginning of a stop text is held back
            held = known[len(shown) :]
            assert held == "" or any(each.startswith(held) and each != held for each in stop)


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces"),
    [
        (["a e", "n", "ough"], ["end"], ["a ", "", "enough", ""]),
        (["a e", "nd it"], ["end"], ["a ", "", ""]),
        (["a e", "n"], ["end"], ["a ", "", "en"]),
        (["abcd"], ["abcd", "bc"], ["a", ""]),
        (["x", "x"], [], ["x", "x", ""]),
        (["one", "two", "three"], ["two"], ["one", "", "", ""]),
    ],
)
def test_stop_texts_by_hand(tokens, stop, pieces):
    assert pushed([token.encode() for token in tokens], stop, Pieces()) == pieces


def test_half_a_character_waits_for_its_other_half():
    face = "😀".encode()
    assert pushed([face[:1], face[1:3], face[3:]], [], Pieces()) == ["", "", "😀", ""]
    assert pushed([face[:2]], [], Pieces()) == ["", "\ufffd"]
    assert pushed([face[:2], b"a"], ["\ufffd"], Pieces()) == ["", "", ""]
    assert pushed(BYTES.encode("né"), [], BYTES) == ["n", "", "é", ""]


def test_places_where_stop_texts_begin_by_hand():
    assert (find_stop("abcd", []), find_stop("abcd", ["x"]), find_stop("abcd", ["cd", "b"])) == (None, None, 1)
    assert (n_held("a en", ["end"]), n_held("a end", ["end"]), n_held("aa", ["aab"]), n_held("", ["x"])) == (2, 0, 2, 0)
