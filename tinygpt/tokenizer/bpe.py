"""Train byte-level BPE: merge the most frequent pair of neighbours again and again (Sennrich et al.,
https://arxiv.org/abs/1508.07909), with the same choices, and so the same merges, as the tokenizers library.

A heap with lazy updates finds the next pair; `Pairs` merges it everywhere in the different pretokens.
"""

import heapq
from collections.abc import Iterable, Mapping

import numpy as np

from tinygpt.errors import UserError
from tinygpt.progress import progress
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR
from tinygpt.tokenizer.merger import ROW_END, Pairs, ids_of
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, count_pretokens
from tinygpt.tokenizer.tokenizer import EOS, Tokenizer


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens from texts: learn_bpe of their pretokens."""
    return learn_bpe(count_pretokens(texts), vocab_size, min_frequency=min_frequency, special_tokens=special_tokens)


def learn_bpe(
    counts: Mapping[bytes, int], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens from pretokens and how often each occurs.

    Ids: `<|endoftext|>` and the other special tokens, the 256 bytes by code point of their stand-ins, then merges in
    the order in which they are found. Among equally frequent pairs, the one with the smaller ids goes first.
    Raises UserError when there are too few pairs, or more pretokens than can be numbered.
    """
    tokens = [EOS, *special_tokens, *sorted(BYTE_TO_CHAR)]  # as Tokenizer.from_merges numbers them
    ids = {token: i for i, token in enumerate(tokens) if i > len(special_tokens)}
    merges: list[tuple[str, str]] = []
    at_least = max(min_frequency, sum(counts.values()) // 5000)  # at first, less frequent pairs are left out
    pairs = _pairs(counts, ids, at_least)
    heap = _heap(pairs)
    with progress("train_tokenizer: merges", total=vocab_size, unit="tokens", start=len(tokens)) as bar:
        while len(tokens) < vocab_size:
            pair = _most_frequent(heap, pairs)
            if pair is None and pairs.at_least == min_frequency:
                break
            if pair is None:
                pairs = pairs.again(at_least=max(min_frequency, pairs.at_least // 20))
                heap = _heap(pairs)
                continue
            left, right = (tokens[i] for i in ids_of(pair))
            merges.append((left, right))
            is_new = left + right not in ids  # another way to the same token adds a merge and no token
            if is_new:
                ids[left + right] = len(tokens)
                tokens.append(left + right)
                bar.update(1)
            found = pairs.merge(pair, ids[left + right])
            if is_new:
                for other in found:
                    heapq.heappush(heap, (-pairs.count[other], other))
            else:
                pairs = pairs.again(at_least=pairs.at_least)
                heap = _heap(pairs)
    if len(tokens) < vocab_size:
        lower = f"lower tokenizer.min_frequency={min_frequency}, " if min_frequency > 1 else ""
        raise UserError(
            f"the training text gives only {len(tokens)} of {vocab_size} tokens: set tokenizer.vocab_size="
            f"{len(tokens)}, {lower}or learn from more text (download.source, tokenizer.max_bytes)"
        )
    return Tokenizer.from_merges(merges, special_tokens)


def _pairs(counts: Mapping[bytes, int], ids: dict[str, int], at_least: int) -> Pairs:
    """The pretokens as rows of byte ids."""
    byte_ids = np.array([ids[char] for char in BYTE_TO_CHAR], np.int32)
    byte_ids[DOCUMENT_BORDER[0]] = ROW_END  # no pretoken has it
    rows = byte_ids[np.frombuffer(b"".join([pretoken + DOCUMENT_BORDER for pretoken in counts]), np.uint8)]
    lengths = np.array([len(pretoken) + 1 for pretoken in counts], np.int64)
    row = np.repeat(np.arange(len(counts), dtype=np.int32), lengths)
    return Pairs(rows, row, np.array([*counts.values()], np.int64), at_least=at_least)


def _heap(pairs: Pairs) -> list[tuple[int, int]]:
    """(-count, pair) of each pair; counts may become outdated."""
    heap = [(-n, pair) for pair, n in pairs.count.items()]
    heapq.heapify(heap)
    return heap


def _most_frequent(heap: list[tuple[int, int]], pairs: Pairs) -> int | None:
    """The pair that occurs most often, None when none is frequent enough."""
    while heap:
        negative, pair = heapq.heappop(heap)
        count = pairs.count.get(pair, 0)
        if count < pairs.at_least:
            continue
        if count == -negative:
            return pair
        heapq.heappush(heap, (-count, pair))
    return None
