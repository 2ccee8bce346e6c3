"""The kinds of tokenizers, and the `tokenizer` group of params.yaml, which chooses one.

All consist of bytes and merges: text without a token of its own is written in bytes, never lost. So one encoder, one
tokenizer.json and one GGUF layout serve all kinds, and llama.cpp and transformers give the same ids.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np

from tinygpt.corpus.folders import cut_lines, shard_texts, split_file, thin
from tinygpt.errors import UserError, shown
from tinygpt.files import atomic_write, sha256_file
from tinygpt.params import Count, Within, require
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import Shard, shard_results
from tinygpt.tokenizer.bpe import learn_bpe
from tinygpt.tokenizer.json_format import to_bytes, to_token
from tinygpt.tokenizer.pretokenize import (
    DOCUMENT_BORDER,
    MAX_PRETOKENS,
    PATTERN,
    PretokenCounts,
    PretokenTable,
    count_pretokens,
)
from tinygpt.tokenizer.tokenizer import EOS, Tokenizer, load_tokenizer, tokenizer_file


@dataclass(frozen=True, kw_only=True)
class TokenizerParams:
    """What the tokenizer learns."""

    group: ClassVar[str] = "tokenizer"

    kind: Literal["bpe", "char", "byte"]  # learned byte pairs; the text's characters; nothing but bytes
    from_file: str | None  # a tokenizer.json to take instead of learning one; null = none
    vocab_size: Annotated[int, Within("[257, 16777216]")]  # tokens in all: exactly for bpe, at most for char
    min_frequency: Count  # a pair (or character) that occurs less often in the training text gets no token
    max_bytes: Count | None  # bytes of data/clean/train.jsonl that it learns from, taken evenly; null = all
    special_tokens: tuple[str, ...]  # names besides <|endoftext|>, such as <|user|>; text never becomes one of them

    def __post_init__(self) -> None:
        names = (EOS, *self.special_tokens)
        require(
            (len(set(names)) == len(names), f"tokenizer.special_tokens must be different names, none of them {EOS}"),
            (all(len(name) > 1 for name in names), "tokenizer.special_tokens must have two or more characters each"),
            (
                self.vocab_size >= 256 + len(names),
                f"tokenizer.vocab_size={self.vocab_size} must have room for 256 bytes and {len(names)} special tokens",
            ),
            *(
                (
                    self.from_file is not None or self.kind == "byte" or not can_be_learned(name),
                    f"tokenizer.special_tokens names {shown(name)}, which could also be learned from the text: "
                    f"name it <|{name}|>, for example",
                )
                for name in self.special_tokens
            ),
        )


def can_be_learned(token: str) -> bool:
    """Whether some text could teach this string as a token: its bytes are, or may be, within one pretoken."""
    try:
        return len(PATTERN.findall(to_bytes(token).decode())) == 1
    except KeyError:  # no learned token has such a character
        return False
    except UnicodeDecodeError:  # it has part of a character
        return True


def build_tokenizer(
    params: TokenizerParams, clean: Path, runtime: RuntimeParams, *, runs: Path | None = None
) -> Tokenizer:
    """The tokenizer that the params describe: an existing one, or one learned from the training texts of data/clean.

    `runs` is as in shard_results.
    """
    if params.from_file:
        return take_tokenizer(params)
    file = split_file(clean, "train")
    shards = thin(cut_lines(file), params.max_bytes or file.stat().st_size)
    key = [sha256_file(file), params.max_bytes]
    with shard_results(save_counts, shards, name="count", key=key, code=__name__, runtime=runtime, runs=runs) as paths:
        counts = sum_counts(paths)
    return learn_tokenizer(counts, params)


def save_counts(shard: Shard, path: Path) -> None:
    """Count the pretokens of a shard of texts into a file of two numpy arrays."""
    found = count_pretokens(shard_texts(shard), _table())
    if len(_table().pretokens) > MAX_PRETOKENS:
        _table.cache_clear()
    pretokens = np.frombuffer(DOCUMENT_BORDER.join(found), np.uint8)
    with atomic_write(path, "wb") as file:
        np.savez(file, pretokens=pretokens, counts=np.array([*found.values()], np.int64))


@functools.cache
def _table() -> PretokenTable:
    """One table for all shards of a worker: pretokens learned from one shard serve the next."""
    return PretokenTable()


def sum_counts(paths: Iterable[Path]) -> PretokenCounts:
    """Add up the counts of several files."""
    _table.cache_clear()  # counting is over: free the memory
    total = PretokenCounts()
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            pretokens = arrays["pretokens"].tobytes().split(DOCUMENT_BORDER)
            total.update(dict(zip(pretokens, arrays["counts"].tolist(), strict=False)))  # no pretokens split into one
    return total


def learn_tokenizer(counts: Mapping[bytes, int], params: TokenizerParams) -> Tokenizer:
    """Learn a tokenizer of `params.kind` from pretokens and how often each occurs."""
    learn = TOKENIZERS[params.kind]
    return learn(counts, params.vocab_size, min_frequency=params.min_frequency, special_tokens=params.special_tokens)


def expected_size(params: TokenizerParams, made: Path) -> int:
    """The tokens that the tokenizer will have; for characters, those of the one in `made`, or else the most.

    Raises UserError if a file that it reads is missing or damaged.
    """
    if params.from_file:
        return take_tokenizer(params).vocab_size
    if params.kind == "byte":
        return learn_tokenizer({}, params).vocab_size
    known = params.kind == "char" and tokenizer_file(made).exists()
    return min(params.vocab_size, load_tokenizer(made).vocab_size) if known else params.vocab_size


def take_tokenizer(params: TokenizerParams) -> Tokenizer:
    """The tokenizer.json of `params.from_file`.  Raises UserError when it cannot be honoured exactly."""
    assert params.from_file is not None
    if not tokenizer_file(params.from_file).is_file():
        raise UserError(f"tokenizer.from_file={params.from_file} not found: give the path of a tokenizer.json")
    tokenizer = load_tokenizer(params.from_file)
    if missing := set(params.special_tokens) - tokenizer.special_tokens.keys():
        raise UserError(
            f"tokenizer.special_tokens names {', '.join(sorted(missing))}, which {params.from_file} does not have: "
            "set it to [] to use those of the file"
        )
    return tokenizer


def learn_chars(
    counts: Mapping[bytes, int], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """A token for each character of the text, the most frequent first, as long as there is room.

    A character of one byte has a token anyway. Others are merged byte by byte, and each of their prefixes is a token
    too. No merge crosses characters, because a byte that begins a character is never inside another (RFC 3629).
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
