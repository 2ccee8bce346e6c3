"""Ids to text as they come: never half a character, never the beginning of a text that ends it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from tinygpt.errors import UserError


class Vocabulary(Protocol):
    """What texts need to know of a tokenizer, ours or another program's."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_id(self) -> int:
        """What ends a text."""

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to the bytes they stand for."""


def checked(prompt: str) -> str:
    """The same text.  Raises UserError where it holds half of a surrogate pair, as no UTF-8 does."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt is no UTF-8 from character {error.start} on: give it as UTF-8") from None
    return prompt


class TextStream:
    """Turn ids into pieces of text, which joined are the text before the first stop text.

    What may be the beginning of a stop text is held back until more is known: with stop "end", the tokens "a e", "n",
    "ough" give the pieces "a ", "", "enough", and "a e", "nd it" the one piece "a ".
    """

    def __init__(self, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # a stop text was found; nothing comes after it
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, next_id: int) -> str:
        """What is now certain to belong to the text."""
        return self._take(self._decoder.decode(self.tokenizer.decode_bytes([next_id])))

    def finish(self) -> str:
        """What was held back, when no more ids come; half a character becomes U+FFFD."""
        piece = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return piece

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        end = find_stop(text, self.stop)
        self.stopped = end is not None
        if end is None:
            end = len(text) - n_held(text, self.stop)
        self._held = "" if self.stopped else text[end:]
        return text[:end]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text begins that is complete first, None without one.

    "abcd" with stop "abcd" and "bc" gives 1: reading character by character, "bc" is there first.
    """
    found = [(begin + len(each), begin) for each in stop if (begin := text.find(each)) >= 0]
    return min(found)[1] if found else None


def n_held(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop text may begin: 2 of "a en" with "end"."""
    longest = min(len(text), max((len(each) - 1 for each in stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(each.startswith(text[-n:]) for each in stop)), 0)
