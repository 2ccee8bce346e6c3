"""What a prompt loses or brings that its model cannot use as it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinygpt.cli.engine import Engine
from tinygpt.cli.prompts import Prompt
from tinygpt.generate.answer import Vocabulary

MOST_NAMED = 10  # characters
SPECIAL = re.compile(rb"<\|.*\|>")  # how special tokens are named


def remarks(prompts: Sequence[Prompt], n_tokens: Sequence[int], engine: Engine) -> list[str]:
    """A line for each prompt that is longer than the context, and for each that has characters without a token."""
    found = [
        f"{prompt.place} has {n:,} tokens: the last {engine.block_size:,} are read, which is the model's context"
        for prompt, n in zip(prompts, n_tokens, strict=True)
        if n > engine.block_size
    ]
    foreign = {prompt: sorted({char for char in prompt.text if ord(char) > 127}) for prompt in prompts}
    known = characters(engine.vocabulary) if any(foreign.values()) else None
    for prompt, chars in foreign.items():
        if known is not None and (unknown := [char for char in chars if char not in known]):
            shown = " ".join(map(repr, unknown[:MOST_NAMED])) + (" …" if len(unknown) > MOST_NAMED else "")
            found.append(f"{prompt.place} has characters that the model has not learned, it reads their bytes: {shown}")
    return found


def characters(vocabulary: Vocabulary) -> set[str] | None:
    """Those of several bytes that have a token, where tokens are characters; None where they are anything else.

    A tokenizer of bytes has none of them. One of characters that saw ASCII alone is the same, and gives None, too.
    """
    pieces = (vocabulary.decode_bytes([i]) for i in range(vocabulary.vocab_size))
    found: set[str] = set()
    for piece in pieces:
        text = piece.decode(errors="ignore")  # the beginning of a character has none
        if len(text) > 1 and not SPECIAL.fullmatch(piece):
            return None
        if len(piece) > 1 and len(text) == 1:
            found.add(text)
    return found or None
