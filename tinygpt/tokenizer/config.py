"""What the tokenizer is: the `tokenizer` group of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Count, Within, require
from tinygpt.tokenizer.tokenizer import EOS


@dataclass(frozen=True, kw_only=True)
class TokenizerParams:
    """What the tokenizer learns."""

    group: ClassVar[str] = "tokenizer"

    kind: Literal["bpe", "char", "byte"]  # learned byte pairs; the text's characters; nothing but bytes
    from_file: str | None  # a tokenizer.json to take instead of learning one; null = none
    vocab_size: Annotated[int, Within("[257, 16777216]")]  # tokens in all: of bpe exactly, of char at most
    min_frequency: Count  # a pair (or character) that occurs less often in the training text gets no token
    max_bytes: Count | None  # bytes of data/clean/train.jsonl that it learns from, evenly taken; null = all
    special_tokens: tuple[str, ...]  # names beside <|endoftext|>, such as <|user|>; text never becomes one of them

    def __post_init__(self) -> None:
        names = (EOS, *self.special_tokens)
        require(
            (len(set(names)) == len(names), f"tokenizer.special_tokens must be different names, none of them {EOS}"),
            (
                not any("\ud800" <= char <= "\udfff" for name in names for char in name),
                "tokenizer.special_tokens must be whole characters, not halves such as \\ud800",
            ),
            (all(len(name) > 1 for name in names), "tokenizer.special_tokens must have two or more characters each"),
            (
                self.vocab_size >= 256 + len(names),
                f"tokenizer.vocab_size={self.vocab_size} must hold 256 bytes and {len(names)} special tokens",
            ),
        )
