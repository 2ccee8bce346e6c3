"""Bytes as printable characters, in which tokens are written.

GPT-2's byte alphabet (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), which the tokenizers
library calls `ByteLevel`.
"""

from __future__ import annotations


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes: itself where it is one, else the next from U+0100 on.

    32 -> "Ġ", 65 -> "A".
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
