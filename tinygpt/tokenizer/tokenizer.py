"""Byte-level BPE: text to ids and back (Sennrich et al., https://arxiv.org/abs/1508.07909, on bytes as in GPT-2)."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from tinygpt.paths import TOKENIZER_FILE
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR, read_tokenizer_json, to_bytes, write_tokenizer_json
from tinygpt.tokenizer.merger import Merger
from tinygpt.tokenizer.pretokenize import PATTERN, to_utf8

EOS = "<|endoftext|>"  # before each document and after the last; ends a generated text
BEGIN, PAD, UNKNOWN = "<|begin|>", "<|pad|>", "<|unk|>"  # special tokens whose names say what they are for


class Tokenizer:
    """Tokens by id, and the merges that build them from bytes.

    `tokens` are strings over the 256 printable stand-ins of bytes; `special_tokens` maps names to ids. Text never
    becomes a special token, whatever it contains.
    """

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[tuple[str, str]], special_tokens: dict[str, int]
    ) -> None:
        self.tokens = list(tokens)
        self.merges = list(merges)
        self.special_tokens = dict(special_tokens)
        special_ids = set(special_tokens.values())
        ids = {token: i for i, token in enumerate(tokens) if i not in special_ids}
        self.merger = Merger([ids[char] for char in BYTE_TO_CHAR], [(ids[a], ids[b], ids[a + b]) for a, b in merges])
        self._bytes = [t.encode() if i in special_ids else to_bytes(t) for i, t in enumerate(tokens)]

    @classmethod
    def from_merges(cls, merges: Sequence[tuple[str, str]], special_tokens: Sequence[str] = ()) -> Self:
        """Ids: `<|endoftext|>`, other special tokens, the 256 bytes by their stand-ins, then what merges make."""
        special = [EOS, *special_tokens]
        made = dict.fromkeys(left + right for left, right in merges)  # two merges may make one token
        return cls([*special, *sorted(BYTE_TO_CHAR), *made], merges, {name: i for i, name in enumerate(special)})

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.special_tokens[EOS]

    @property
    def token_bytes(self) -> list[int]:
        """How many UTF-8 bytes of text each id stands for, 0 for a special token."""
        special = set(self.special_tokens.values())
        return [0 if i in special else len(raw) for i, raw in enumerate(self._bytes)]

    @property
    def bos_id(self) -> int:
        """The id that a text begins with: `<|begin|>` where the tokenizer has it, else `<|endoftext|>`."""
        return self.special_tokens.get(BEGIN, self.eos_id)

    @property
    def border_ids(self) -> list[int]:
        """The ids before each document of a token file: `<|endoftext|>`, and `<|begin|>` where there is one."""
        return list(dict.fromkeys([self.eos_id, self.bos_id]))

    @property
    def pad_id(self) -> int | None:
        """Id of `<|pad|>`, which occurs in no text and no training; None without it."""
        return self.special_tokens.get(PAD)

    @property
    def unk_id(self) -> int | None:
        """Id of `<|unk|>`, which no text needs; None without it."""
        return self.special_tokens.get(UNKNOWN)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type, little-endian, that holds every id: uint16 or uint32."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Text to ids.  A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
        pretokens = PATTERN.findall(text)
        different = dict.fromkeys(pretokens)
        found, length = self.merger.merge_all([*map(to_utf8, different)])
        ids, bounds = found.tolist(), [0, *np.cumsum(length).tolist()]
        ids_of = {pretoken: ids[a:b] for pretoken, (a, b) in zip(different, pairwise(bounds), strict=True)}
        return [i for pretoken in pretokens for i in ids_of[pretoken]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to the bytes they stand for, a special token to its name.  Raises ValueError for an id out of range."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, found {wrong[0]:d}")
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into a folder."""
        write_tokenizer_json(Path(folder) / TOKENIZER_FILE, self.tokens, self.merges, self.special_tokens)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the folder that holds one.  Raises UserError when it is missing or not ours."""
    return Tokenizer(*read_tokenizer_json(tokenizer_file(path), required=EOS))


def tokenizer_file(path: str | Path) -> Path:
    """The `tokenizer.json` itself, or that in a folder."""
    path = Path(path)
    return path if path.is_file() or path.suffix == ".json" else path / TOKENIZER_FILE
