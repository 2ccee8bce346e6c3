"""Finding documents that stood there before, exactly or nearly.

Near duplicates by MinHash over word 5-grams (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900) and an index of
bands. The library is `rensa`: its signatures depend on nothing but the text and SEED.
"""

from __future__ import annotations

import hashlib
import operator
from array import array

from tinygpt.errors import UserError

SHINGLE_WORDS = 5
HASHES = 64  # values in a signature; the estimate of a similarity of 0.8 is right to about 0.05
SEED = 1
LEAST_RECALL = 0.6  # share of the pairs just at the threshold that the index of bands must find
DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """What stands for a text where texts are compared; two texts of a corpus never share one."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


class NearDuplicates:
    """Remembers documents, about 1 kB each, and tells whether a similar one came before."""

    def __init__(self, threshold: float) -> None:
        try:
            from rensa import RMinHash, RMinHashLSH
        except ImportError:
            raise UserError("clean.near_duplicates needs rensa: pip install rensa, or set it to null") from None
        self.threshold = threshold
        self._minhash = RMinHash
        self._index = RMinHashLSH(threshold, HASHES, _n_band(threshold))
        self._signatures = array("I")  # HASHES values a document
        self._n = 0

    def seen(self, text: str) -> bool:
        """Whether `text` is at least `threshold` alike (Jaccard, estimated) to one before; if not, remember it."""
        minhash = self._minhash(HASHES, SEED)
        minhash.update(shingles(text))
        signature = minhash.digest()
        if any(self._similarity(signature, key) >= self.threshold for key in self._index.query(minhash)):
            return True
        self._index.insert(self._n, minhash)
        self._signatures.extend(signature)
        self._n += 1
        return False

    def _similarity(self, signature: list[int], key: int) -> float:
        other = self._signatures[key * HASHES : (key + 1) * HASHES]
        return sum(map(operator.eq, signature, other)) / HASHES


def shingles(text: str) -> list[str]:
    """Every run of SHINGLE_WORDS words; a shorter text is one shingle."""
    words = text.split()
    if len(words) < SHINGLE_WORDS:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)))


def _n_band(threshold: float) -> int:
    """The fewest bands that find LEAST_RECALL of the pairs at the threshold: fewer are less memory and fewer tests."""
    n_band = 1
    while n_band < HASHES and 1 - (1 - threshold ** (HASHES / n_band)) ** n_band < LEAST_RECALL:
        n_band *= 2
    return n_band
