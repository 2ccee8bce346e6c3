"""Cut text into the pretokens inside which byte pairs are merged, and write bytes as printable characters.

The pattern and the byte alphabet are GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"), which llama.cpp calls `gpt-2` and the tokenizers library `ByteLevel`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import regex

PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A pretoken always begins at a space that stands before a non-space, so text may be cut there first, at the speed of
# `re`; the pattern is then run on each different chunk only once. `re` counts U+001C to U+001F as white space and
# `regex` does not: those places are merely not cut.
CHUNK_BORDER = re.compile(r" (?=\S)")

MAX_CHUNKS = 1_000_000  # different chunks held while counting, about 100 MB


def split_chunks(text: str) -> tuple[str, list[str]]:
    """Cut before each space that stands before a non-space: "so it is" -> ("so", ["it", "is"]).

    The first chunk is as it stands; each of the others has lost the space that it began with.
    """
    first, *rest = CHUNK_BORDER.split(text)
    return first, rest


def count_pretokens(texts: Iterable[str]) -> Counter[str]:
    """How often each pretoken occurs: ["to be to"] -> {"to": 1, " be": 1, " to": 1}."""
    pretokens: Counter[str] = Counter()
    chunks: Counter[str] = Counter()
    for text in texts:
        first, rest = split_chunks(text)
        pretokens.update(PATTERN.findall(first))
        chunks.update(rest)
        if len(chunks) > MAX_CHUNKS:
            _count_inside(chunks, pretokens)
            chunks.clear()
    _count_inside(chunks, pretokens)
    return pretokens


def _count_inside(chunks: Counter[str], pretokens: Counter[str]) -> None:
    for chunk, n in chunks.items():
        for pretoken in PATTERN.findall(" " + chunk):
            pretokens[pretoken] += n


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes: itself where it is one, else the next from U+0100 on.

    `byte_alphabet()[0x20]` is "Ġ", the space.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def to_token(raw: bytes) -> str:
    """Bytes as a token's string: b" the" -> "Ġthe"."""
    return "".join(BYTE_TO_CHAR[byte] for byte in raw)


def to_bytes(token: str) -> bytes:
    """A token's string as its bytes: "Ġthe" -> b" the".  Raises KeyError for a character outside the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in token)
