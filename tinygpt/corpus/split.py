"""Which documents train the model and which ones evaluate it, and the facts about each that decide this."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import compress, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.duplicates import DIGEST_BYTES, HASHES, Signatures, digest, signature
from tinygpt.corpus.folders import SPLITS, text_line
from tinygpt.errors import UserError
from tinygpt.files import atomic_folder, human_bytes, write_json

TRAIN, VAL, TEST = range(len(SPLITS))
NOWHERE = -1
FEW_DOCUMENTS = 5  # with fewer, a measurement depends more on the choice of documents than on the model
FEW_BYTES = 10_000

FACTS = np.dtype(
    [
        ("digest", f"S{DIGEST_BYTES}"),
        ("place", "<u8"),  # a hash, for the hash split
        ("bytes", "<u8"),  # of UTF-8
        ("characters", "<u8"),
    ]
)

Facts = NDArray[np.void]
Assigned = NDArray[np.int8]  # by document: TRAIN, VAL, TEST or NOWHERE
Parts = dict[int, list[tuple[int, str]]]  # document -> (split, text) of the parts that it is cut into


def save_cleaned(path: Path, texts: Iterable[str], counts: Mapping[str, Any], *, seed: int, sign: bool) -> None:
    """Write the folder of one shard: texts and facts, and signatures to find near duplicates if `sign`.

    `counts` is read last, once all texts have been counted.
    """
    facts: list[tuple[object, ...]] = []
    signatures: list[list[int]] = []
    with atomic_folder(path) as folder:
        with open(folder / "texts.jsonl", "wb") as file:
            for text in texts:
                file.write(text_line(text).encode())
                facts.append((digest(text), place(text, seed), len(text.encode()), len(text)))
                signatures.append(signature(text) if sign else [])
        (folder / "facts").write_bytes(np.array(facts, FACTS).tobytes())
        (folder / "signatures").write_bytes(np.array(signatures, np.uint32).tobytes())
        write_json(folder / "counts.json", counts)


class Cleaned:
    """The documents of all shards, numbered in order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        parts = [np.fromfile(folder / "facts", FACTS) for folder in folders]
        self.n_documents = [len(part) for part in parts]  # of each shard
        self.facts: Facts = np.concatenate([np.empty(0, FACTS), *parts])

    def signatures(self) -> Iterator[Signatures]:
        """The signatures, shard by shard."""
        return (np.fromfile(folder / "signatures", np.uint32).reshape(-1, HASHES) for folder in self.folders)

    def lines(self) -> Iterator[bytes]:
        """The JSON line of each document."""
        for folder in self.folders:
            with open(folder / "texts.jsonl", "rb") as file:
                yield from file

    def text(self, document: int) -> str:
        """One document's text, by its number."""
        return str(json.loads(next(islice(self.lines(), document, None)))["text"])

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Counts by rule, and repaired bytes by file, of all shards together."""
        rules: Counter[str] = Counter()
        repaired: Counter[str] = Counter()
        for folder in self.folders:
            counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
            rules.update(counts["rules"])
            repaired.update(counts["repaired"])
        return rules, repaired


class Shares(NamedTuple):
    """The shares of val and test."""

    val: float
    test: float


class Splits(NamedTuple):
    """Where each document goes."""

    assigned: Assigned
    parts: Parts  # of documents that lie across a border between splits


def place(text: str, seed: int) -> int:
    """A hash of a text below 2**64, the same on every machine."""
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "little")


def by_hash(facts: Facts, official: Assigned, shares: Shares, text_of: Callable[[int], str]) -> Splits:
    """Choose by a hash of the text, so that a document stays in its split whatever else joins the corpus."""
    where = facts["place"] / 2.0**64  # uniform in [0, 1)
    assigned = np.where(where < shares.test, TEST, np.where(where < shares.test + shares.val, VAL, TRAIN))
    return Splits(assigned.astype(np.int8), {})


def by_tail(facts: Facts, official: Assigned, shares: Shares, text_of: Callable[[int], str]) -> Splits:
    """Cut the corpus by characters: train first, then val, then test; a document on a border is cut in two.

    With val 0.1 and test 0, train is `text[: int(n * 0.9)]`.
    """
    ends = np.cumsum(facts["characters"].astype(np.int64))
    n = int(ends[-1]) if len(ends) else 0
    begins = ends - facts["characters"].astype(np.int64)
    bounds = [0, int(n * (1 - shares.val - shares.test)), int(n * (1 - shares.test)), n]
    assigned = (np.searchsorted(bounds[1:-1], begins, side="right")).astype(np.int8)
    parts: Parts = {}
    for document in np.flatnonzero(np.searchsorted(bounds[1:-1], ends, side="left") > assigned).tolist():
        text, begin = text_of(document), int(begins[document])
        pieces = [(i, text[max(0, bounds[i] - begin) : max(0, bounds[i + 1] - begin)]) for i in range(len(SPLITS))]
        parts[document] = [(split, piece) for split, piece in pieces if piece]
    return Splits(assigned, parts)


SPLITTERS: dict[str, Callable[[Facts, Assigned, Shares, Callable[[int], str]], Splits]] = {
    "hash": by_hash,
    "tail": by_tail,
    "source": lambda facts, official, shares, text_of: Splits(official, {}),
}


def choose_splitter(how: str, facts: Facts, shares: Shares) -> str:
    """The splitter to use; for "auto", "hash" if that gives val and test FEW_DOCUMENTS each, else "tail".

    So one long text, or a few, are cut: val and test come from the end.
    """
    if how != "auto":
        return how
    assigned = by_hash(facts, np.empty(0, np.int8), shares, str).assigned
    wanted = [split for split, share in ((VAL, shares.val), (TEST, shares.test)) if share]
    return "hash" if all(np.count_nonzero(assigned == split) >= FEW_DOCUMENTS for split in wanted) else "tail"


def check_held_out(n_documents: Mapping[str, int], split: str) -> None:
    """Raise UserError if there is nothing to validate on in training, or nothing in `split` to evaluate on afterwards.

    `n_documents` has the number of documents in each split, from reports/clean.json or data/tokens/meta.json.
    """
    for name, reader in (("val", "train"), (split, f"evaluate.split={split}")):
        if not n_documents[name]:
            others = [other for other in SPLITS[1:] if n_documents[other]]
            other = f"set evaluate.split to {others[0]}, or " if others and name == split != "val" else ""
            raise UserError(
                f"{reader} needs {name} documents, but there are none: {other}set clean.{name}_fraction above 0 and "
                "clean.split to auto"
            )


def little_held_out(counts: Mapping[str, int], how: str) -> list[str]:
    """A warning for each of val and test that is too small for a meaningful measurement."""
    found = []
    for name in SPLITS[1:]:
        n_document, n_bytes = counts[f"{name}_documents"], counts[f"{name}_bytes"]
        if n_document and (n_bytes < FEW_BYTES or (n_document < FEW_DOCUMENTS and how != "tail")):
            found.append(f"{name} has {human_bytes(n_bytes)} (documents: {n_document:,})")
    return found


def drop_leaks(splits: Splits, facts: Facts) -> int:
    """Remove from train what is also in val or test.  -> the number of texts removed"""
    assigned, parts = splits
    digests, whole = facts["digest"], np.ones(len(facts), np.bool_)
    whole[[*parts]] = False
    evaluation = [digest(text) for pieces in parts.values() for split, text in pieces if split != TRAIN]
    known = np.concatenate([digests[whole & (assigned > TRAIN)], np.array(evaluation, digests.dtype)])
    leaked = whole & (assigned == TRAIN) & np.isin(digests, known)
    assigned[leaked] = NOWHERE
    n_leaked = int(leaked.sum())
    for pieces in parts.values():
        training = [piece for piece in pieces if piece[0] == TRAIN]
        if training and np.isin(np.array(digest(training[0][1]), digests.dtype), known):
            pieces.remove(training[0])
            n_leaked += 1
    return n_leaked


def split_cleaned(
    cleaned: Cleaned, kept: NDArray[np.bool_], official: Assigned, how: str, shares: Shares, folder: Path
) -> tuple[str, Counter[str]]:
    """Write the kept documents into the files of their splits.  -> the splitter; counts of leaks, documents, bytes"""
    facts, documents = cleaned.facts[kept], np.flatnonzero(kept)
    how = choose_splitter(how, facts, shares)
    splits = SPLITTERS[how](facts, official[kept], shares, lambda i: cleaned.text(documents[i]))
    n_leaked = drop_leaks(splits, facts)
    counts = write_splits(splits, facts, compress(cleaned.lines(), kept), folder)
    counts["leaked"] = n_leaked
    return how, counts


def write_splits(splits: Splits, facts: Facts, lines: Iterable[bytes], folder: Path) -> Counter[str]:
    """Write train.jsonl, val.jsonl and test.jsonl from the documents' lines; count documents and bytes of text."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.jsonl", "wb")) for name in SPLITS]
        for document, (line, n_bytes) in enumerate(zip(lines, facts["bytes"].tolist(), strict=True)):
            pieces = [(splits.assigned[document], line, n_bytes)]
            if document in splits.parts:
                found = splits.parts[document]
                pieces = [(split, text_line(text).encode(), len(text.encode())) for split, text in found]
            for split, content, size in pieces:
                if split != NOWHERE:
                    files[split].write(content)
                    counts.update({f"{SPLITS[split]}_documents": 1, f"{SPLITS[split]}_bytes": size})
    return counts
