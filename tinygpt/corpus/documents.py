"""Read documents from the text files of data/raw, in pieces small enough for any memory.

A file is only cut where documents begin or end, so its parts, read one by one, give the same documents as the whole.
"""

import codecs
import io
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path

from tinygpt.corpus.folders import TEXTS, Manifest, RawFile, line_ends, shard_bytes
from tinygpt.corpus.raw import MOST_LINE, bad_line, line_text, lines
from tinygpt.files import unchanged
from tinygpt.shards import Shard, Span

CHUNK_BYTES = 1 << 20
MOST_CHARACTERS = 16 << 20  # a longer document is cut at line ends into several


class Reader:
    """Reads documents and counts what it changes in them: `counts`, and `repaired` bytes by file."""

    def __init__(self, raw: Path, manifest: Manifest, *, separator: str | None, newlines: bool) -> None:
        self.folder = raw.absolute() / TEXTS
        self.separator = separator or manifest.separator
        self.newlines = newlines
        start = manifest.document_start
        self.start = re.compile(start) if start and not separator else None
        border = rf"^(?={self.start.pattern})" if self.start else re.escape(self.separator or "")
        self.border = re.compile(border.encode(), re.MULTILINE) if border else None  # where a file may be cut
        self.counts: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def iter_texts(self, shard: Shard) -> Iterator[str]:
        """The text of each document in a shard, except those of only white space."""
        for text in chain.from_iterable(map(self._texts, shard.spans)):
            if text and not text.isspace():
                self.counts["documents_in"] += 1
                self.counts["bytes_in"] += len(text.encode())
                yield text

    def _texts(self, span: Span) -> Iterator[str]:
        name = str(span.path.relative_to(self.folder))
        if name.lower().endswith(".jsonl"):
            return self._json_texts(span, name)
        chunks = self._repaired(span, name)
        if self.newlines:
            chunks = self._with_newlines(chunks)
        if self.start:
            return self._split_before(chunks, self.start)
        return self._split_at(chunks, self.separator)

    def _json_texts(self, span: Span, name: str) -> Iterator[str]:
        begin = span.begin
        with open(span.path, "rb") as file:
            file.seek(begin)
            while begin < span.end and (line := file.readline(MOST_LINE + 1)):
                if line.strip():
                    if len(line) > MOST_LINE or (found := line_text(line)) is None:
                        raise bad_line(name, _line_number(span.path, begin), line)
                    text = self._repair(found, name)  # JSON can hold half a character: "\ud800"
                    yield from self._split_at(self._with_newlines([text]) if self.newlines else [text], None)
                begin += len(line)

    def _repaired(self, span: Span, name: str) -> Iterator[str]:
        """The span as text in chunks; each byte that is not UTF-8 becomes U+FFFD and is counted."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        with open(span.path, "rb") as file:
            file.seek(span.begin)
            while chunk := file.read(min(CHUNK_BYTES, span.end - file.tell())):
                yield self._repair(decoder.decode(chunk), name)
        yield self._repair(decoder.decode(b"", final=True), name)

    def _repair(self, text: str, name: str) -> str:
        try:
            text.encode()  # many times faster than a search for surrogates
        except UnicodeEncodeError:
            text, n = re.subn("[\ud800-\udfff]", "\ufffd", text)
            self.repaired[name] += n
        return text

    def _with_newlines(self, chunks: Iterable[str]) -> Iterator[str]:
        r"""The same text with "\n" for every "\r\n" and "\r", even if a chunk ends between the two."""
        decoder = io.IncrementalNewlineDecoder(None, translate=True)
        for chunk in chunks:
            self.counts["newlines_changed"] += chunk.count("\r")
            yield decoder.decode(chunk)
        yield decoder.decode("", final=True)

    def _split_at(self, chunks: Iterable[str], separator: str | None) -> Iterator[str]:
        """The documents between separators, without line ends around them; the whole text if there is no separator."""
        rest = ""
        for chunk in chunks:
            rest += chunk
            if separator:
                *whole, rest = rest.split(separator)  # `rest` may end with a part of the next separator
                self.counts["separators"] += len(whole)
                yield from (text.strip("\n") for text in whole)
            while len(rest) > MOST_CHARACTERS + len(separator or ""):
                piece, rest = self._cut(rest)
                yield piece
        yield rest.strip("\n") if separator else rest

    def _split_before(self, chunks: Iterable[str], start: re.Pattern[str]) -> Iterator[str]:
        """Documents, each beginning with a line that matches `start`; white space before the first belongs to it."""
        document: list[str] = []
        size = 0
        for line in lines(chunks, "\n", MOST_CHARACTERS):
            if (start.match(line) and any(map(str.strip, document))) or size > MOST_CHARACTERS:
                self.counts["long_cut"] += not start.match(line)
                yield "".join(document)
                document, size = [], 0
            document.append(line)
            size += len(line)
        yield "".join(document)

    def _cut(self, text: str) -> tuple[str, str]:
        self.counts["long_cut"] += 1
        end = text.rfind("\n", 0, MOST_CHARACTERS) + 1 or MOST_CHARACTERS
        return text[:end], text[end:]


def _line_number(path: Path, position: int) -> int:
    """The number, from 1, of the line that begins at `position`."""
    with open(path, "rb") as file:
        chunks = (file.read(min(CHUNK_BYTES, position - at)) for at in range(0, position, CHUNK_BYTES))
        return 1 + sum(chunk.count(b"\n") for chunk in chunks)


def raw_shards(reader: Reader, files: Sequence[RawFile]) -> Iterator[tuple[Shard, str | None]]:
    """Shards of the files, in order, each with the official split of its files.

    Raises UserError if a file has changed since `download` wrote it.
    """
    n_bytes = shard_bytes(sum(file.bytes for file in files))
    for split, group in groupby(files, lambda file: file.split):
        paths = (unchanged(reader.folder / file.name, file.sha256, stage="download") for file in group)
        spans = (span for path in paths for span in _cut(reader, path, n_bytes))
        yield from ((shard, split) for shard in join_spans(spans, n_bytes))


def join_spans(spans: Iterable[Span], n_bytes: int) -> Iterator[Shard]:
    """Join spans, in order, into shards of at least `n_bytes`; the last may have fewer."""
    joined: list[Span] = []
    size = 0
    for span in spans:
        joined.append(span)
        size += span.size
        if size >= n_bytes:
            yield Shard(tuple(joined))
            joined, size = [], 0
    if joined:
        yield Shard(tuple(joined))


def _cut(reader: Reader, path: Path, n_bytes: int) -> Iterator[Span]:
    """A file cut into spans of about `n_bytes`; one span if its documents leave no place to cut."""
    size = path.stat().st_size
    ends: Iterable[int] = [size]
    if size > n_bytes and path.name.lower().endswith(".jsonl"):
        ends = line_ends(path, n_bytes)
    elif size > n_bytes and reader.border:
        changes = reader.newlines and bool(reader.start or re.search("[\r\n]", reader.separator or ""))
        ends = _borders(path, n_bytes, reader.border, changes=changes)
    return (Span(path, begin, end) for begin, end in pairwise([0, *ends]))


def _borders(path: Path, n_bytes: int, sought: re.Pattern[bytes], *, changes: bool) -> Iterator[int]:
    r"""Where to cut: ends of matches of `sought`, each at least `n_bytes` after the last one, and the end of the file.

    If the reader `changes` line ends in these matches, a file with "\r" is not cut: the reader sees other bytes.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        last = 0
        is_read_so = not changes or whole.find(b"\r") < 0
        for found in sought.finditer(whole) if is_read_so else ():
            end = found.end()
            if end - last < n_bytes:
                continue
            if last or found[0] or whole[:end].decode("utf-8", "replace").strip():  # else white space before the first
                yield end
                last = end
        if last < len(whole):
            yield len(whole)
