"""The kinds of tokenizers, how each is learned, and the `tokenizer` group of params.yaml, which chooses one.

All are bytes and merges: what has no token of its own is written in bytes, never lost. So one encoder, one
tokenizer.json and one GGUF layout serve all kinds, with the same ids in llama.cpp and transformers.

Byte-level BPE merges the most frequent pair of neighbours again and again (Sennrich et al.,
https://arxiv.org/abs/1508.07909), with the choices of the tokenizers library, so that the merges are the same. A heap
with lazy updates finds the next pair of the different pretokens; `Pairs` merges it wherever it is.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np

from tinygpt.errors import UserError
from tinygpt.params import Count, Within, require
from tinygpt.progress import progress
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR, to_bytes, to_token
from tinygpt.tokenizer.merger import ROW_END, Pairs, ids_of
from tinygpt.tokenizer.pretokenize import DOCUMENT_BORDER, PATTERN
from tinygpt.tokenizer.pretokens import count_corpus, count_pretokens
from tinygpt.tokenizer.tokenizer import EOS, Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerParams:
    """What the tokenizer learns."""

    group: ClassVar[str] = "tokenizer"

    kind: Literal["bpe", "char", "byte"]  # learned byte pairs; the text's characters; nothing but bytes
    from_file: str | None  # a tokenizer.json to take instead of learning one; null = none
    vocab_size: Annotated[int, Within("[257, 16777216]")]  # tokens in all: of bpe exactly, of char at most
    min_frequency: Count  # a pair (or character) that occurs less often in the training text gets no token
    max_bytes: Count | None  # bytes of data/clean/train.jsonl that it learns from, evenly taken; null = all
    special_tokens: tuple[str, ...]  # names besides <|endoftext|>, such as <|user|>; text never becomes one of them

    def __post_init__(self) -> None:
        names = (EOS, *self.special_tokens)
        require(
            (len(set(names)) == len(names), f"tokenizer.special_tokens must be different names, none of them {EOS}"),
            (all(len(name) > 1 for name in names), "tokenizer.special_tokens must have two or more characters each"),
            (
                self.vocab_size >= 256 + len(names),
                f"tokenizer.vocab_size={self.vocab_size} must hold 256 bytes and {len(names)} special tokens",
            ),
            *(
                (
                    self.from_file is not None or self.kind == "byte" or not can_be_learned(name),
                    f"tokenizer.special_tokens names {name!r}, which the text may teach as a token of its own: "
                    f"name it {f'<|{name}|>'!r}, say",
                )
                for name in self.special_tokens
            ),
        )


def can_be_learned(token: str) -> bool:
    """Whether a token learned from some text may have that string: its bytes are within one pretoken, or may be."""
    try:
        return len(PATTERN.findall(to_bytes(token).decode())) == 1
    except KeyError:  # no learned token has such a character
        return False
    except UnicodeDecodeError:  # part of characters
        return True


def build_tokenizer(
    params: TokenizerParams, clean: Path, runtime: RuntimeParams, *, runs: Path | None = None
) -> Tokenizer:
    """The tokenizer that the params describe: a ready one, or one learned from the training texts of data/clean.

    `runs` is as in shard_results.
    """
    if params.from_file:
        return take_tokenizer(params)
    return learn_tokenizer(count_corpus(clean, params.max_bytes, runtime, runs=runs), params)


def learn_tokenizer(counts: Mapping[bytes, int], params: TokenizerParams) -> Tokenizer:
    """Learn a tokenizer of `params.kind` from pretokens and how often each occurs."""
    learn = TOKENIZERS[params.kind]
    return learn(counts, params.vocab_size, min_frequency=params.min_frequency, special_tokens=params.special_tokens)


def take_tokenizer(params: TokenizerParams) -> Tokenizer:
    """The tokenizer.json of `params.from_file`.  Raises UserError when it cannot be honoured exactly."""
    assert params.from_file is not None
    if not Path(params.from_file).exists():
        raise UserError(f"tokenizer.from_file={params.from_file} not found: give the path of a tokenizer.json")
    tokenizer = load_tokenizer(params.from_file)
    if missing := set(params.special_tokens) - tokenizer.special_tokens.keys():
        raise UserError(
            f"tokenizer.special_tokens names {', '.join(sorted(missing))}, which {params.from_file} does not have: "
            "set it to [], the file's own are taken"
        )
    return tokenizer


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
    the order in which they were found. Among equally frequent pairs the one of smaller ids goes first.
    Raises UserError when there are too few pairs, or more pretokens than can be numbered.
    """
    tokens = [EOS, *special_tokens, *sorted(BYTE_TO_CHAR)]  # as Tokenizer.from_merges numbers them
    ids = {token: i for i, token in enumerate(tokens) if i > len(special_tokens)}
    merges: list[tuple[str, str]] = []
    at_least = max(min_frequency, sum(counts.values()) // 5000)  # at first only pairs as frequent as this
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
        raise UserError(
            f"the training text gives only {len(tokens)} tokens: lower tokenizer.vocab_size={vocab_size} "
            f"or tokenizer.min_frequency={min_frequency}, raise tokenizer.max_bytes, or take more text"
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
    """(-count, pair) of each pair; the counts may become outdated."""
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


def learn_chars(
    counts: Mapping[bytes, int], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """A token for each character of the text, as long as there is room the more frequent one.

    A character of one byte has its token anyway. Others are put together byte by byte, and each beginning of theirs is
    a token too; no merge crosses characters, because no byte that begins one is inside another (RFC 3629).
    """
    characters: Counter[str] = Counter()
    for pretoken, n in counts.items():
        for character in pretoken.decode():
            characters[character] += n
    merges: dict[str, tuple[str, str]] = {}
    room = vocab_size - 256 - 1 - len(special_tokens)
    for character, n in sorted(characters.items(), key=lambda item: (-item[1], item[0])):
        token = to_token(character.encode())
        new = {token[:end]: (token[: end - 1], token[end - 1]) for end in range(2, len(token) + 1)}
        if n >= min_frequency and len(merges) + len(new.keys() - merges.keys()) <= room:
            merges |= new
    return Tokenizer.from_merges([*merges.values()], special_tokens)


def learn_bytes(
    counts: Mapping[bytes, int], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """The 256 bytes and the special tokens; there is nothing to learn."""
    return Tokenizer.from_merges([], special_tokens)


# By tokenizer.kind: counts of pretokens, vocab_size, min_frequency and special_tokens -> a tokenizer.
TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {"bpe": learn_bpe, "char": learn_chars, "byte": learn_bytes}
