"""How well a tokenizer fits a text: bytes per token, tokens per word, how much of the vocabulary is of use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tinygpt.corpus.folders import iter_texts
from tinygpt.encode import BulkEncoder
from tinygpt.files import atomic_write
from tinygpt.report.plots import BLUE, GREEN, NO_DATE, STYLE, VERMILION
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.pretokenize import iter_blocks


@dataclass
class Fit:
    """What a tokenizer makes of a text."""

    counts: NDArray[np.int64]  # occurrences of each id, 0 of special tokens
    n_bytes: int = 0  # of UTF-8
    n_words: int = 0  # between white space

    @property
    def n_tokens(self) -> int:
        """Ids in all."""
        return int(self.counts.sum())


def fit_file(tokenizer: Tokenizer, path: Path) -> Fit:
    """Encode the documents of a file of data/clean."""
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


def plot_fit(fits: Mapping[str, tuple[Tokenizer, Fit]], path: Path) -> None:
    """How often tokens occur, by rank, and how many bytes of the text are in tokens of which length."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, (tokenizer, fit)), color, style in zip(
            fits.items(), (BLUE, VERMILION, GREEN), ("-", "--", ":"), strict=False
        ):
            used = np.sort(fit.counts[fit.counts > 0])[::-1]
            left.plot(np.arange(1, len(used) + 1), used, style, color=color, label=name)
            sizes = np.array(tokenizer.token_bytes)
            share = np.bincount(sizes, weights=fit.counts * sizes) / fit.n_bytes
            right.plot(np.arange(1, len(share)), share[1:], style, color=color, marker="o", markersize=3, label=name)
        left.set(xscale="log", yscale="log", xlabel="token, by rank", ylabel="occurrences", title="How often")
        right.set(xlabel="bytes of a token", ylabel="share of the text", title="How long", xlim=(0, 20.5))
        left.legend()
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=120, metadata=NO_DATE[path.suffix[1:]])
