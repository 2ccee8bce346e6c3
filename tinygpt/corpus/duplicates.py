"""Find documents that repeat an earlier one, exactly or nearly.

Near duplicates are found by MinHash over word 5-grams, whose values are compared in bands (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900). The library is `rensa`: its signatures depend only on the text and on
SEED.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tinygpt.progress import progress

SHINGLE_WORDS = 5
HASHES = 64  # values in a signature; they estimate a similarity of 0.8 to about 0.05
SEED = 1
PIECE_WORDS = 100_000
LEAST_RECALL = 0.6  # share of the pairs just at the threshold that the bands must find
DIGEST_BYTES = 16
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd and without pattern: the golden ratio's digits

Mask = NDArray[np.bool_]
Signatures = NDArray[np.uint32]  # HASHES values a document


def digest(text: str) -> bytes:
    """A hash that stands for a text in comparisons; two texts of a corpus never share one."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def signature(text: str) -> list[int]:
    """HASHES values; the share of them that two texts have in common estimates their similarity (Jaccard)."""
    minhash = RMinHash(HASHES, SEED)
    words = text.split()
    for begin in range(0, max(1, len(words) - SHINGLE_WORDS + 1), PIECE_WORDS):  # shingles take 20 times their text
        minhash.update(shingles(words[begin : begin + PIECE_WORDS + SHINGLE_WORDS - 1]))
    return minhash.digest()


def shingles(words: list[str]) -> list[str]:
    """Every run of SHINGLE_WORDS words; fewer words are one shingle."""
    if len(words) < SHINGLE_WORDS:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)))


def came_before(digests: NDArray[np.bytes_]) -> Mask:
    """Which documents are equal to an earlier one."""
    again = np.ones(len(digests), np.bool_)
    again[np.unique(digests, return_index=True)[1]] = False
    return again


def near_duplicates(signatures: Callable[[], Iterable[Signatures]], kept: Mask, threshold: float) -> Mask:
    """Which of the `kept` documents have a similarity of at least `threshold` to an earlier one that stays.

    `signatures()` gives those of all documents, in order, in parts. The memory is that of the bands, 64 bytes per
    document at a threshold of 0.8, and of the signatures of the documents that share a band with another.
    """
    n_band = _n_band(threshold)
    bands = np.concatenate([np.empty((0, n_band), np.uint64), *(_bands(part, n_band) for part in signatures())])
    groups: dict[int, list[int]] = defaultdict(list)  # document -> the groups of equal bands that it is in
    for band in range(n_band):
        for document, group in _shared(bands[:, band], kept):
            groups[document].append(group * n_band + band)
    documents = sorted(groups)
    rows = enumerate(chain.from_iterable(signatures()))
    signature_of = {document: row.copy() for document, row in rows if document in groups}
    alike = np.zeros(len(kept), np.bool_)
    staying: dict[int, list[int]] = defaultdict(list)  # group -> its documents
    with progress("near-duplicates", total=len(documents), unit="documents") as bar:
        for document in documents:
            candidates = sorted({other for group in groups[document] for other in staying[group]})
            others = np.array([signature_of[other] for other in candidates], np.uint32).reshape(-1, HASHES)
            similarity = (others == signature_of[document]).mean(axis=1)
            alike[document] = bool((similarity >= threshold).any())
            if not alike[document]:
                for group in groups[document]:
                    staying[group].append(document)
            bar.update(1)
    return alike


def _bands(signatures: Signatures, n_band: int) -> NDArray[np.uint64]:
    """A hash of the values in each band of each document."""
    values = signatures.reshape(-1, n_band, HASHES // n_band)
    hashes = np.zeros(values.shape[:2], np.uint64)
    for i in range(values.shape[2]):
        hashes = (hashes ^ values[:, :, i]) * FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _shared(hashes: NDArray[np.uint64], kept: Mask) -> Iterator[tuple[int, int]]:
    """(document, group) of each kept document that shares its hash with another; a group has the same hash."""
    documents = np.flatnonzero(kept)
    _, group, size = np.unique(hashes[documents], return_inverse=True, return_counts=True)
    several = np.flatnonzero(size[group] > 1)
    return zip(documents[several].tolist(), group[several].tolist(), strict=True)


def _n_band(threshold: float) -> int:
    """The fewest bands, a power of two, that find LEAST_RECALL of the pairs at the threshold: fewer save memory."""
    n_band = 1
    while n_band < HASHES and 1 - (1 - threshold ** (HASHES / n_band)) ** n_band < LEAST_RECALL:
        n_band *= 2
    return n_band
