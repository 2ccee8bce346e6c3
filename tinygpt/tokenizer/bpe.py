"""Train byte-level BPE: merge the most frequent pair of neighbours again and again (Sennrich et al.,
https://arxiv.org/abs/1508.07909), with the choices of the tokenizers library, so that the merges are the same.

All different pretokens stand in one array, linked to their neighbours. A merge touches only the places where its
pair stands, all of them at once in numpy; a heap with lazy updates finds the next pair.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.params import Count, Within, require
from tinygpt.progress import progress
from tinygpt.tokenizer.pretokenize import BYTE_TO_CHAR, count_pretokens, to_token
from tinygpt.tokenizer.tokenizer import EOS, Tokenizer

Places = NDArray[np.integer]  # indices into the array of all pretokens
SHIFT = 32  # a pair of ids as one number: left << SHIFT | right
NO_TOKEN = -1  # stands between pretokens and in places that a merge has emptied


@dataclass(frozen=True, kw_only=True)
class TokenizerParams:
    """What the tokenizer learns."""

    group: ClassVar[str] = "tokenizer"

    vocab_size: Annotated[int, Within("[257, 16777216]")]  # tokens in all: special ones, 256 bytes, merges
    min_frequency: Count  # a pair that occurs less often in the training text is not merged
    special_tokens: tuple[str, ...]  # names beside <|endoftext|>, such as <|user|>; text never becomes one of them

    def __post_init__(self) -> None:
        names = (EOS, *self.special_tokens)
        require(
            (len(set(names)) == len(names), f"tokenizer.special_tokens must be different names, none of them {EOS}"),
            (all(len(name) > 1 for name in names), "tokenizer.special_tokens must have two or more characters each"),
            (
                self.vocab_size >= 256 + len(names),
                f"tokenizer.vocab_size={self.vocab_size} must hold 256 bytes and {len(names)} special tokens",
            ),
        )


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens.

    Ids: `<|endoftext|>` and the other special tokens, the 256 bytes by code point of their stand-ins, then merges in
    the order in which they were found. Of equally frequent pairs the one of smaller ids goes first.
    Raises UserError when the texts have too few pairs.
    """
    tokens = [EOS, *special_tokens, *sorted(BYTE_TO_CHAR)]
    counts = count_pretokens(texts)
    merges: list[tuple[str, str]] = []
    ids = {token: i for i, token in enumerate(tokens) if i > len(special_tokens)}
    pairs = _Pairs([to_token(p.encode()) for p in counts], list(counts.values()), ids)
    with progress("train_tokenizer: merges", total=vocab_size, unit="tokens", start=len(tokens)) as bar:
        while len(tokens) < vocab_size:
            pair, frequency = pairs.most_frequent()
            if frequency < min_frequency:
                break
            left, right = tokens[pair >> SHIFT], tokens[pair & (1 << SHIFT) - 1]
            merges.append((left, right))
            if left + right not in ids:  # another way to the same token adds a merge and no token
                ids[left + right] = len(tokens)
                tokens.append(left + right)
                bar.update(1)
            pairs.merge(pair, ids[left + right])
    if len(tokens) < vocab_size:
        raise UserError(
            f"the training text gives only {len(tokens)} tokens: lower tokenizer.vocab_size={vocab_size} "
            f"or tokenizer.min_frequency={min_frequency}, or take more text"
        )
    return Tokenizer(tokens, merges, {name: i for i, name in enumerate([EOS, *special_tokens])})


class _Pairs:
    """The pairs of neighbours in all pretokens: how frequent each is and where it stands."""

    def __init__(self, words: list[str], counts: list[int], ids: dict[str, int]) -> None:
        lengths = np.array([len(word) + 1 for word in words], np.int64)
        self.ids = np.array([i for word in words for i in (*map(ids.__getitem__, word), NO_TOKEN)], np.int32)
        self.weight = np.repeat(np.array(counts, np.int64), lengths)  # occurrences of the pretoken of each place
        self.next = np.minimum(np.arange(1, len(self.ids) + 1), len(self.ids) - 1).astype(np.int32)
        self.previous = np.arange(-1, len(self.ids) - 1, dtype=np.int32)
        self.count: dict[int, int] = {}
        self.places: dict[int, list[Places]] = {}  # where a pair has stood; some may have changed since
        self.heap: list[tuple[int, int]] = []  # (-count, pair), perhaps outdated
        left = np.flatnonzero(self.ids != NO_TOKEN)
        self._add(left[self.ids[left + 1] != NO_TOKEN])

    def most_frequent(self) -> tuple[int, int]:
        """The pair that occurs most often and its count; (0, 0) when there is none."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            count = self.count.get(pair, 0)
            if count == -negative and count > 0:
                return pair, count
            if count > 0:
                heapq.heappush(self.heap, (-count, pair))
        return 0, 0

    def merge(self, pair: int, merged: int) -> None:
        """Put the token `merged` wherever `pair` stands."""
        at = self._places_of(pair)
        right = self.next[at]
        # A place stands for the pair that begins there. Both neighbours of two adjacent merges share one.
        self._remove(self._unique(self.previous[at], right))
        del self.count[pair]
        after = self.next[right]
        self.ids[at], self.ids[right] = merged, NO_TOKEN
        self.next[at], self.previous[after] = after, at
        self._add(self._unique(self.previous[at], at))

    def _unique(self, *places: Places) -> Places:
        """Each place once, and only where a pair begins."""
        at = np.unique(np.concatenate(places))
        return at[(at >= 0) & (self.ids[at] != NO_TOKEN) & (self.ids[self.next[at]] != NO_TOKEN)]

    def _places_of(self, pair: int) -> Places:
        """The places where the pair stands now, leftmost first and without overlap: "aaa" has "aa" once."""
        at = np.unique(np.concatenate(self.places.pop(pair)))
        left, right = pair >> SHIFT, pair & (1 << SHIFT) - 1
        at = at[(self.ids[at] == left) & (self.ids[self.next[at]] == right)]
        if left != right:
            return at
        goes_on = np.r_[False, self.next[at[:-1]] == at[1:]]  # overlaps the pair before it
        index = np.arange(len(at))
        run_start = np.maximum.accumulate(np.where(goes_on, 0, index))
        return at[(index - run_start) % 2 == 0]

    def _grouped(self, places: Places) -> list[tuple[int, int, Places]]:
        """Places by the pair that begins there: (pair, sum of weights, places)."""
        if not len(places):
            return []
        pairs = self.ids[places].astype(np.int64) << SHIFT | self.ids[self.next[places]]
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.r_[0, np.flatnonzero(np.diff(pairs)) + 1]
        sums = np.add.reduceat(self.weight[places], starts)
        return [*zip(pairs[starts].tolist(), sums.tolist(), np.split(places, starts[1:]), strict=True)]

    def _add(self, places: Places) -> None:
        for pair, n, at in self._grouped(places):
            self.count[pair] = self.count.get(pair, 0) + n
            self.places.setdefault(pair, []).append(at)
            heapq.heappush(self.heap, (-self.count[pair], pair))

    def _remove(self, places: Places) -> None:
        for pair, n, _ in self._grouped(places):
            self.count[pair] -= n
