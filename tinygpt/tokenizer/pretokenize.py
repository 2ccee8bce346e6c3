"""Cut text into pretokens, inside which byte pairs are merged; number and count them.

Text is cut by a pattern: as a regex, and as array arithmetic for much text at a time.

The pattern is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), which llama.cpp
calls `gpt-2` and the tokenizers library `ByteLevel`. Classes of characters are those of the `regex` module.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import regex
from numpy.typing import NDArray

PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A pretoken always begins at a space before a non-space, so text may be cut there. `re` counts U+001C to
# U+001F as white space and `regex` does not: those places are merely not cut.
CHUNK_BORDER = re.compile(r" (?=\S)")
CONTRACTION = re.compile(rb"'(?:[stmd]|re|ve|ll)")

DOCUMENT_BORDER = b"\xff"  # between documents in a block: a byte that UTF-8 never has
BLOCK_BYTES = 1 << 20  # text at a time: a processor's cache holds it and what is computed from it

SPACE, LETTER, NUMBER, OTHER, BORDER = range(5)  # classes of characters
CLASSES = ((SPACE, r"\s+"), (LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"))

MAX_PRETOKENS = 1_000_000  # different pretokens remembered, about 180 MB; more of them start the table anew
SLOT_BITS = 18  # of the cache: 5 MB, which holds most of a text's pretokens
KEY_BYTES = 16  # pretokens up to this length are found by arrays, longer ones (about 1 in 100) by a dict
PIECE = 1 << 13  # pretokens looked up together; the next piece finds in the cache what this one put there
# PADDING[n] is the bits after n bytes of a little-endian word. UTF-8 never has 0xFF, so different pretokens differ.
PADDING = np.array([2**64 - 2 ** (8 * n) for n in range(9)], np.uint64)
NO_KEY = np.array([2**64 - 1, 0], np.uint64)  # the key of no pretoken
# Odd, and without a pattern: digits of the golden ratio and of sqrt(2).
FACTORS = np.array([0x9E3779B97F4A7C15, 0x6A09E667F3BCC909], np.uint64)

Words = NDArray[np.uint64]
Numbers = NDArray[np.int32]
PretokenCounts = Counter[bytes]


def to_utf8(text: str) -> bytes:
    """Text as UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def iter_blocks(texts: Iterable[str]) -> Iterator[bytes]:
    """Texts as UTF-8 in blocks of about a megabyte, a DOCUMENT_BORDER before each text.

    A long text is cut where a pretoken begins, so the blocks' pretokens are those of the texts.
    """
    parts, size = [], 0
    for text in texts:
        parts.append(DOCUMENT_BORDER)
        for piece in _pieces(text):
            parts.append(to_utf8(piece))
            size += len(parts[-1])
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    yield b"".join(parts)


def _pieces(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > BLOCK_BYTES and (border := CHUNK_BORDER.search(text, begin + BLOCK_BYTES)):
        yield text[begin : border.start()]
        begin = border.start()
    yield text[begin:] if begin else text


def pretoken_starts(block: bytes) -> NDArray[np.int64]:
    """Where pretokens begin in a block of UTF-8, and then the block's length: b"so it" -> [0, 2, 5].

    They are the pretokens that PATTERN finds in each document, and each DOCUMENT_BORDER by itself.
    """
    n = len(block)
    if not n:
        return np.zeros(1, np.int64)
    raw, classes = np.frombuffer(block, np.uint8), _classes(block)
    starts = np.ones(n + 1, bool)
    np.not_equal(classes[1:], classes[:-1], out=starts[1:n])
    starts[:n] |= classes == BORDER
    # When text follows white space, the last white space begins a pretoken; a plain space and the text are one.
    last = np.flatnonzero(starts[1:n] & (classes[:-1] == SPACE) & (classes[1:] != BORDER))
    starts[last[raw[last] == ord(" ")] + 1] = False
    for _ in range(2):  # white space has up to three bytes: back to its first
        last = last - (raw[last] & 0xC0 == 0x80)
    starts[last] = True
    spans = np.array([found.span() for found in CONTRACTION.finditer(block)], np.int64).reshape(-1, 2)
    begin, end = spans[starts[spans[:, 0]]].T
    starts[begin + 1] = False
    starts[end] = True
    return np.flatnonzero(starts)


def _classes(block: bytes) -> NDArray[np.uint8]:
    """The class of each byte: that of its character."""
    classes = np.frombuffer(block.translate(_byte_classes()), np.uint8)
    if block.isascii():
        return classes
    raw, classes = np.frombuffer(block, np.uint8), classes.copy()
    for length, low, high in ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8)):  # RFC 3629, section 3
        at = np.flatnonzero((raw >= low) & (raw < high))
        code_points = raw[at].astype(np.int32) & (0x7F >> length)
        for i in range(1, length):
            code_points = code_points << 6 | raw[at + i] & 0x3F
        found = _character_classes()[code_points]
        for i in range(length):
            classes[at + i] = found
    return classes


@functools.cache
def _character_classes() -> NDArray[np.uint8]:
    """The class of each code point."""
    classes = np.full(0x110000, OTHER, np.uint8)
    surrogates = range(0xD800, 0xE000)  # no characters
    for begin, end in ((0, surrogates.start), (surrogates.stop, 0x110000)):
        characters = "".join(map(chr, range(begin, end)))
        for kind, pattern in CLASSES:
            for match in regex.finditer(pattern, characters):
                classes[begin + match.start() : begin + match.end()] = kind
    return classes


@functools.cache
def _byte_classes() -> bytes:
    """The class of each byte that is a character by itself, and of DOCUMENT_BORDER, the last byte."""
    return bytes([*_character_classes()[:128], *[OTHER] * 127, BORDER])


class PretokenTable:
    """Different pretokens, numbered in the order in which they first occur.

    `table.number(block)` gives the number of each pretoken in the block and learns the new ones;
    `table.pretokens[number]` is its bytes. Numbers are exact: keys are the bytes themselves.
    """

    def __init__(self) -> None:
        self.pretokens: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        # The cache: for each hash, the last pretoken as a key of two words, and its number.
        self._first, self._second = (np.full(1 << SLOT_BITS, word) for word in NO_KEY)
        self._cached = np.zeros(1 << SLOT_BITS, np.int32)

    def number(self, block: bytes) -> Numbers:
        """The number of each pretoken of a block (as iter_blocks gives it), in their order."""
        starts = pretoken_starts(block)
        first, second, is_long = _keys(block, starts)
        slots = (_hash(first, second) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        numbers = np.empty(len(slots), np.int32)
        for begin in range(0, len(slots), PIECE):
            piece = slice(begin, begin + PIECE)
            at = slots[piece]
            numbers[piece] = self._cached[at]
            differs = (self._first[at] != first[piece]) | (self._second[at] != second[piece]) | is_long[piece]
            missing = begin + np.flatnonzero(differs)
            at = slots[missing]
            places = zip(starts[missing].tolist(), starts[missing + 1].tolist(), strict=True)
            numbers[missing] = self._cached[at] = self._learn([block[start:end] for start, end in places])
            self._first[at], self._second[at] = first[missing], second[missing]
        return numbers

    def _learn(self, pretokens: list[bytes]) -> list[int]:
        for pretoken in pretokens:
            if self._numbers.setdefault(pretoken, len(self.pretokens)) == len(self.pretokens):
                self.pretokens.append(pretoken)
        return [self._numbers[pretoken] for pretoken in pretokens]


def _keys(block: bytes, starts: NDArray[np.int64]) -> tuple[Words, Words, NDArray[np.bool_]]:
    """Two words for each pretoken, NO_KEY for a long one, and whether it is long."""
    begin, length = starts[:-1], np.diff(starts)
    padded = np.frombuffer(block + bytes(2 * KEY_BYTES), np.uint8)
    words = np.ndarray((len(block) + KEY_BYTES,), "<u8", buffer=padded, strides=(1,))  # the word that begins at a byte
    first, second = words[begin] | PADDING[np.minimum(length, 8)], np.full(len(begin), PADDING[0])
    is_long = length > KEY_BYTES
    longer = np.flatnonzero((length > 8) & ~is_long)
    second[longer] = words[begin[longer] + 8] | PADDING[length[longer] - 8]
    first[is_long], second[is_long] = NO_KEY
    return first, second, is_long


def _hash(first: Words, second: Words) -> Words:
    mixed = first * FACTORS[0]
    return (mixed ^ mixed >> np.uint64(32) ^ second * FACTORS[1]) * FACTORS[0]


def count_pretokens(texts: Iterable[str], table: PretokenTable | None = None) -> PretokenCounts:
    """["to be to"] -> {b"to": 1, b" be": 1, b" to": 1}; `table` may know pretokens from other texts."""
    table, counts = table or PretokenTable(), np.zeros(0, np.int64)
    for block in iter_blocks(texts):
        numbers = table.number(block)
        more = np.bincount(numbers, minlength=len(table.pretokens))
        more[: len(counts)] += counts
        counts = more
    at = np.flatnonzero(counts)
    found = Counter(dict(zip(map(table.pretokens.__getitem__, at.tolist()), counts[at].tolist(), strict=True)))
    del found[DOCUMENT_BORDER]
    return found
