"""Which document trains the model and which ones measure it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tinygpt.corpus.documents import Document
from tinygpt.corpus.duplicates import digest
from tinygpt.corpus.jsonl import text_line
from tinygpt.errors import UserError

NAMES = ("train", "val", "test")


class Shares(NamedTuple):
    """The shares of val and test, and the seed that chooses their documents."""

    val: float
    test: float
    seed: int


def by_hash(documents: Iterable[Document], shares: Shares, spool: Path) -> Iterator[Document]:
    """Choose by a hash of the text, so that a document stays in its split whatever else joins the corpus."""
    salt = shares.seed.to_bytes(8, "little")
    for text, _ in documents:
        hashed = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
        place = int.from_bytes(hashed, "little") / 2**64  # even in [0, 1)
        split = "test" if place < shares.test else "val" if place < shares.test + shares.val else "train"
        yield Document(text, split)


def by_tail(documents: Iterable[Document], shares: Shares, spool: Path) -> Iterator[Document]:
    """Cut the corpus by characters: train first, then val, then test; a document on a border is cut in two.

    With val 0.1 and test 0 a text is cut as `text[: int(n * 0.9)]`.  Test and val come out before train.
    """
    lengths = array("q")  # characters of each document
    with open(spool, "w", encoding="utf-8", newline="\n") as file:
        for text, _ in documents:
            file.write(text_line(text))
            lengths.append(len(text))
    n = sum(lengths)
    val_begin = int(n * (1 - shares.val - shares.test))
    test_begin = int(n * (1 - shares.test))
    for split, begin, end in (("test", test_begin, n), ("val", val_begin, test_begin), ("train", 0, val_begin)):
        for text in _between(spool, lengths, begin, end):
            yield Document(text, split)
    spool.unlink()


def _between(spool: Path, lengths: Iterable[int], begin: int, end: int) -> Iterator[str]:
    """The documents, or their parts, between two character positions of the whole corpus."""
    position = 0
    with open(spool, "rb") as file:
        for line, length in zip(file, lengths, strict=True):
            if position < end and begin < position + length:
                yield json.loads(line)["text"][max(begin - position, 0) : end - position]
            position += length


def by_source(documents: Iterable[Document], shares: Shares, spool: Path) -> Iterator[Document]:
    """Keep the official splits.  Raises UserError for a document that is in none."""
    for document in documents:
        if document.split not in NAMES:
            raise UserError("clean.split=source needs a source with official splits: set it to hash or tail")
        yield document


SPLITTERS: dict[str, Callable[[Iterable[Document], Shares, Path], Iterator[Document]]] = {
    "hash": by_hash,
    "tail": by_tail,
    "source": by_source,
}


def write_splits(documents: Iterable[Document], folder: Path) -> Counter[str]:
    """Write train.jsonl, val.jsonl and test.jsonl, less what train shares with the others.

    A train document whose exact text came before in val or test is dropped and counted as `leaked`.
    Returns documents and UTF-8 bytes of text by split.
    """
    counts: Counter[str] = Counter()
    evaluation: set[bytes] = set()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.jsonl", "wb")) for name in NAMES}
        for text, split in documents:
            assert split in files
            if split != "train":
                evaluation.add(digest(text))
            elif evaluation and digest(text) in evaluation:
                counts["leaked"] += 1
                continue
            files[split].write(text_line(text).encode())
            counts[f"{split}_documents"] += 1
            counts[f"{split}_bytes"] += len(text.encode())
    return counts
