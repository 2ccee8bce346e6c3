"""What cleaning one shard leaves: its texts, and of each text what must be known to choose between documents.

A folder with `texts.jsonl`, `facts.npy` (a row a document), `signatures.npy` (likewise) and `counts.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.corpus.duplicates import DIGEST_BYTES, Signatures
from tinygpt.corpus.jsonl import text_line
from tinygpt.files import atomic_folder, write_json

FACTS = np.dtype(
    [
        ("digest", f"S{DIGEST_BYTES}"),
        ("place", "<u8"),  # what the hash split looks at
        ("bytes", "<u8"),  # of UTF-8
        ("characters", "<u8"),
        ("line_bytes", "<u8"),  # in texts.jsonl
    ]
)

Facts = NDArray[np.void]


class CleanDocument(NamedTuple):
    """A clean text and what is known of it."""

    text: str
    digest: bytes
    place: int
    signature: list[int]  # empty where near duplicates are not looked for


def save_cleaned(path: Path, documents: Iterable[CleanDocument], counts: Mapping[str, Any]) -> None:
    """Write the folder of one shard; `counts` is looked at when all documents were."""
    facts: list[tuple[object, ...]] = []
    signatures: list[list[int]] = []
    with atomic_folder(path) as folder:
        with open(folder / "texts.jsonl", "wb") as file:
            for text, digest, place, signature in documents:
                size = file.write(text_line(text).encode())
                facts.append((digest, place, len(text.encode()), len(text), size))
                signatures.append(signature)
        np.save(folder / "facts.npy", np.array(facts, FACTS))
        np.save(folder / "signatures.npy", np.array(signatures, np.uint32))
        write_json(folder / "counts.json", counts)


class Cleaned:
    """The documents of all shards in one row."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        parts = [np.load(folder / "facts.npy", allow_pickle=False) for folder in folders]
        self.n_documents = [len(part) for part in parts]  # of each shard
        self.facts: Facts = np.concatenate([np.empty(0, FACTS), *parts])

    def signatures(self) -> Iterator[Signatures]:
        """Those of one shard after the other."""
        return (np.load(folder / "signatures.npy", allow_pickle=False) for folder in self.folders)

    def lines(self) -> Iterator[bytes]:
        """The line of each document."""
        for folder in self.folders:
            with open(folder / "texts.jsonl", "rb") as file:
                yield from file

    def text(self, document: int) -> str:
        """One document's text, by its number."""
        shard = int(np.searchsorted(np.cumsum(self.n_documents), document, side="right"))
        first = sum(self.n_documents[:shard])
        with open(self.folders[shard] / "texts.jsonl", "rb") as file:
            file.seek(int(self.facts["line_bytes"][first:document].sum()))
            return str(json.loads(file.readline())["text"])

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Counts by rule, and repaired bytes by file, of all shards together."""
        rules: Counter[str] = Counter()
        repaired: Counter[str] = Counter()
        for folder in self.folders:
            counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
            rules.update(counts["rules"])
            repaired.update(counts["repaired"])
        return rules, repaired
