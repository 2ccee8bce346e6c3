"""Byte-level BPE in its simplest form: read it before `learn_bpe` and `merger.py`, which do the same fast.

Sennrich et al., https://arxiv.org/abs/1508.07909, on bytes as in GPT-2. Tokens are strings over the 256 printable
stand-ins of bytes.
"""

from collections import Counter
from itertools import pairwise

from tinygpt.tokenizer.json_format import BYTE_TO_CHAR
from tinygpt.tokenizer.pretokenize import PATTERN

Merge = tuple[str, str]


def split_bytes(pretoken: str) -> tuple[str, ...]:
    """One token for each byte: "né" -> ("n", "Ã", "©")"""
    return tuple(BYTE_TO_CHAR[byte] for byte in pretoken.encode())


def merge_pair(word: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    """Join the pair wherever it occurs, from left to right: a a a b, (a, a) -> aa a b"""
    joined: list[str] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return tuple(joined)


def learn_merges(text: str, n_merge: int) -> list[Merge]:
    """Join the most frequent pair of neighbours, n_merge times; among equals, the one with the smaller ids."""
    words = Counter(split_bytes(pretoken) for pretoken in PATTERN.findall(text))
    ids = {char: i for i, char in enumerate(sorted(BYTE_TO_CHAR))}
    merges: list[Merge] = []
    for _ in range(n_merge):
        counts: Counter[Merge] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                counts[pair] += n
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault(best[0] + best[1], len(ids))
        merges.append(best)
        words = Counter({merge_pair(word, best): n for word, n in words.items()})
    return merges


def apply_merges(text: str, merges: list[Merge]) -> list[str]:
    """Text to tokens: the bytes of each pretoken, joined by the merges in the order in which they were learned."""
    tokens: list[str] = []
    for pretoken in PATTERN.findall(text):
        word = split_bytes(pretoken)
        for pair in merges:
            word = merge_pair(word, pair)
        tokens += word
    return tokens
