"""Byte-level BPE: text to ids and back (Sennrich et al., https://arxiv.org/abs/1508.07909, on bytes as in GPT-2)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from tinygpt.tokenizer.json_format import read_tokenizer_json, write_tokenizer_json
from tinygpt.tokenizer.pretokenize import BYTE_TO_CHAR, PATTERN, split_chunks, to_bytes

EOS = "<|endoftext|>"  # stands before each document and after the last; ends a generated text
TOKENIZER_FILE = "tokenizer.json"
MAX_CACHED = 500_000  # entries of each cache, about 100 MB; when full it starts anew
MAX_CACHED_CHARS = 64  # longer pieces hardly ever come again


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
        self._byte_ids = [ids[char] for char in BYTE_TO_CHAR]
        self._ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(merges)}
        self._bytes = [t.encode() if i in special_ids else to_bytes(t) for i, t in enumerate(tokens)]
        self._chunks = _ChunkCache(self)
        self._pretokens: dict[str, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.special_tokens[EOS]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type, little-endian, that holds every id: uint16 or uint32."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Text to ids.  A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
        return np.frombuffer(self.encode_to_bytes(text), self.dtype).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_to_bytes(self, text: str) -> bytes:
        """Text to the little-endian bytes of its ids, as they stand in a token file."""
        first, rest = split_chunks(text)
        return b"".join([self.encode_chunk(first), *map(self._chunks.__getitem__, rest)])

    def encode_chunk(self, chunk: str) -> bytes:
        """`encode_to_bytes` without the cut into chunks: one pass of the pattern, each pretoken looked up."""
        return b"".join([self._pretokens.get(p) or self._encode_pretoken(p) for p in PATTERN.findall(chunk)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to the bytes they stand for, a special token to its name.  Raises ValueError for an id out of range."""
        ids = list(ids)
        if not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must be within [0, {self.vocab_size}), found {[*map(int, ids)]}")
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into a folder."""
        write_tokenizer_json(Path(folder) / TOKENIZER_FILE, self.tokens, self.merges, self.special_tokens)

    def _encode_pretoken(self, pretoken: str) -> bytes:
        raw = pretoken.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace").encode()
        encoded = np.array(merge([self._byte_ids[byte] for byte in raw], self._ranks), self.dtype).tobytes()
        if len(pretoken) <= MAX_CACHED_CHARS:
            if len(self._pretokens) >= MAX_CACHED:
                self._pretokens.clear()
            self._pretokens[pretoken] = encoded
        return encoded


class _ChunkCache(dict[str, bytes]):
    """The encoded form of chunks that follow a space, made when first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, chunk: str) -> bytes:
        encoded = self.tokenizer.encode_chunk(" " + chunk)
        if len(chunk) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED:
                self.clear()
            self[chunk] = encoded
        return encoded


def merge(ids: list[int], ranks: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merge neighbours, the pair of lowest rank first and of equal ranks the leftmost, until none is left.

    `ranks` maps a pair to (rank, merged id): merge([1, 2, 3], {(2, 3): (0, 4), (1, 4): (1, 5)}) -> [5].
    """
    ids, end = list(ids), len(ids)
    following, preceding = list(range(1, end + 1)), list(range(-1, end - 1))
    heap = [(*ranks[pair], i, *pair) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)  # (rank, merged id, position, left id, right id): by rank, then by position
    while heap:
        _, merged, i, left, right = heapq.heappop(heap)
        j = following[i]
        if ids[i] != left or j == end or ids[j] != right:
            continue  # one of the two has been merged with another neighbour since
        ids[i], ids[j] = merged, -1
        following[i] = following[j]
        if following[i] < end:
            preceding[following[i]] = i
        for start in (preceding[i], i):
            after = following[start] if start >= 0 else end
            if after < end and (pair := (ids[start], ids[after])) in ranks:
                heapq.heappush(heap, (*ranks[pair], start, *pair))
    return [i for i in ids if i >= 0]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the folder that holds one.  Raises UserError when it is missing or not ours."""
    path = Path(path)
    path = path / TOKENIZER_FILE if path.suffix != ".json" else path
    return Tokenizer(*read_tokenizer_json(path, required=EOS))
