"""The kinds of tokenizers.  All are bytes and merges: what has no token of its own is written in bytes, never lost.

So one encoder, one tokenizer.json and one GGUF layout serve all kinds, with the same ids in llama.cpp and transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.tokenizer.alphabet import to_token
from tinygpt.tokenizer.bpe import learn_bpe
from tinygpt.tokenizer.config import TokenizerParams
from tinygpt.tokenizer.tokenizer import Tokenizer, load_tokenizer


def learn_tokenizer(counts: Mapping[bytes, int], params: TokenizerParams) -> Tokenizer:
    """Learn a tokenizer of `params.kind` from pretokens and how often each occurs."""
    learn = KINDS[params.kind]
    return learn(counts, params.vocab_size, min_frequency=params.min_frequency, special_tokens=params.special_tokens)


def take_tokenizer(params: TokenizerParams) -> Tokenizer:
    """The tokenizer.json of `params.from_file`.  Raises UserError when it cannot be honoured exactly."""
    assert params.from_file is not None
    if not Path(params.from_file).exists():
        raise UserError(f"tokenizer.from_file={params.from_file} not found: give the path of a tokenizer.json")
    tokenizer = load_tokenizer(params.from_file)
    if missing := set(params.special_tokens) - tokenizer.special_tokens.keys():
        raise UserError(
            f"tokenizer.special_tokens names {', '.join(sorted(missing))}, which {params.from_file} has not: "
            "set it to [], the file's own are taken"
        )
    return tokenizer


def learn_chars(
    counts: Mapping[bytes, int], vocab_size: int, *, min_frequency: int = 1, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """A token for each character of the text, as long as there is room the more frequent one.

    A character of one byte has its token anyway. Others are put together byte by byte, and each beginning of theirs is
    a token too; no merge crosses characters, because no byte that begins one stands inside another (RFC 3629).
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


KINDS = {"bpe": learn_bpe, "char": learn_chars, "byte": learn_bytes}
