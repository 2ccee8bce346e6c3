"""What a tokenizer's tokens are like: how long, how much of a text, and how they cut one."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygpt.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds

N_LONGEST = 24  # tokens
N_PARAGRAPH = 120  # tokens
LONGEST_SHOWN = 16  # bytes of a token from where on lengths are counted together
MOST_COUNTED = 10_000_000  # tokens of a text


def vocabulary(tokenizer: Tokenizer, tokens: TokenIds) -> dict[str, Any]:
    """How long tokens are: of the vocabulary the longest, of the text the share that tokens of each length make up."""
    counts = np.bincount(tokens[:MOST_COUNTED], minlength=tokenizer.vocab_size)
    sizes = np.array(tokenizer.token_bytes)
    in_text = np.bincount(np.minimum(sizes, LONGEST_SHOWN), weights=counts * sizes, minlength=LONGEST_SHOWN + 1)
    of_all = np.bincount(np.minimum(sizes, LONGEST_SHOWN), minlength=LONGEST_SHOWN + 1)
    return {
        "vocab_size": tokenizer.vocab_size,
        "used": float((counts[sizes > 0] > 0).mean()),
        "longest": [raw.decode("utf-8", errors="replace") for raw in longest_tokens(tokenizer, N_LONGEST)],
        "lengths": [
            {"bytes": n, "tokens": int(of_all[n]), "share": round(float(in_text[n] / max(1.0, in_text.sum())), 4)}
            for n in range(1, LONGEST_SHOWN + 1)
        ],
    }


def paragraph(tokenizer: Tokenizer, tokens: TokenIds) -> list[str]:
    """The first tokens of a text, as pieces; of a character that several make up the last one has all of it."""
    pieces, held = list[str](), b""
    for id in tokens[: N_PARAGRAPH + 1]:
        if id in tokenizer.border_ids:
            continue
        held += tokenizer.decode_bytes([int(id)])
        text = held.decode("utf-8", errors="replace")
        if not text.endswith("\ufffd"):
            pieces.append(text)
            held = b""
    return pieces


def longest_tokens(tokenizer: Tokenizer, n: int) -> list[bytes]:
    """The n tokens of most bytes, special ones left out."""
    special = set(tokenizer.special_tokens.values())
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size) if i not in special]
    return sorted(tokens, key=lambda raw: (-len(raw), raw))[:n]
