"""How well a tokenizer fits a text: bytes per token, tokens per word, how much of the vocabulary is in use."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.folders import iter_texts
from tinygpt.encode import BulkEncoder
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.pretokenize import iter_blocks
from tinygpt.tokens import TokenIds

if TYPE_CHECKING:
    import pandas as pd

N_LONGEST = 24  # tokens
N_PARAGRAPH = 120  # tokens
LONGEST_SHOWN = 16  # bytes of a token; longer ones are counted as of this length
MOST_COUNTED = 10_000_000  # tokens of a text, at most


@dataclass
class Fit:
    """What a tokenizer makes of a text."""

    counts: NDArray[np.int64]  # occurrences of each id, 0 for special tokens
    n_bytes: int = 0  # of UTF-8
    n_words: int = 0  # between white space

    @property
    def n_tokens(self) -> int:
        """Tokens in all, without special ones."""
        return int(self.counts.sum())


def fit_file(tokenizer: Tokenizer, path: Path) -> Fit:
    """Encode the documents in a file of data/clean."""
    fit = Fit(np.zeros(tokenizer.vocab_size, np.int64))

    def texts() -> Iterator[str]:
        for text in iter_texts(path):
            fit.n_bytes += len(text.encode())
            fit.n_words += len(text.split())
            yield text

    encoder = BulkEncoder(tokenizer)
    for block in iter_blocks(texts()):
        fit.counts += np.bincount(encoder.encode(block), minlength=tokenizer.vocab_size)
    fit.counts[[*tokenizer.special_tokens.values()]] = 0
    return fit


def fit_table(fits: Mapping[tuple[str, str], Fit]) -> pd.DataFrame:
    """A row for each (tokenizer, split) with a text."""
    import pandas as pd  # here, because the stages that count tokens need no table

    rows = [
        {
            "tokenizer": name,
            "split": split,
            "bytes per token": round(fit.n_bytes / fit.n_tokens, 3),
            "tokens per word": round(fit.n_tokens / max(1, fit.n_words), 3),  # also called fertility
            "vocabulary used": f"{(fit.counts > 0).mean():.1%}",
        }
        for (name, split), fit in fits.items()
        if fit.n_tokens
    ]
    return pd.DataFrame(rows)


def vocabulary(tokenizer: Tokenizer, tokens: TokenIds) -> dict[str, Any]:
    """How long tokens are: the longest of the vocabulary, and the share of the text in tokens of each length."""
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
    """The first tokens of a text, as pieces; a character of several tokens is in the piece of the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids = [id for id in tokens[: N_PARAGRAPH + 1].tolist() if id not in tokenizer.border_ids]
    return [*filter(None, (decoder.decode(tokenizer.decode_bytes([id])) for id in ids))]


def longest_tokens(tokenizer: Tokenizer, n: int) -> list[bytes]:
    """The n tokens with the most bytes, except special ones."""
    special = set(tokenizer.special_tokens.values())
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size) if i not in special]
    return sorted(tokens, key=lambda raw: (-len(raw), raw))[:n]
