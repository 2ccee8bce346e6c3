"""From the text files of data/raw to documents, in pieces small enough for any memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tinygpt.corpus.raw import TEXTS, Manifest, RawFile
from tinygpt.errors import UserError
from tinygpt.progress import progress

CHUNK_BYTES = 1 << 20
MOST_CHARACTERS = 16 << 20  # a longer document is cut at line ends into consecutive ones
EVALUATION_FIRST = ("test", "val", "train")  # so that what training shares with them is found in training

Tick = Callable[[int], object]  # told the number of bytes read


class Document(NamedTuple):
    """A text, and the split that it belongs to where that is known."""

    text: str
    split: str | None


class Reader:
    """Reads documents and counts what had to be changed for it: `counts`, and `repaired` bytes by file."""

    def __init__(self, raw: Path, manifest: Manifest, *, separator: str | None, newlines: bool) -> None:
        self.folder = raw / TEXTS
        self.files = manifest.files
        self.separator = separator or manifest.separator
        self.newlines = newlines
        start = manifest.document_start
        self.start = re.compile(start) if start and not separator else None
        self.counts: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def iter_documents(self, *, evaluation_first: bool) -> Iterator[Document]:
        """Every document with more than white space in it, file by file in the manifest's order.

        With `evaluation_first` the files of the test and val splits come before those of train.
        """
        files = self.files
        if evaluation_first:
            files = tuple(sorted(files, key=lambda file: EVALUATION_FIRST.index(file.split or "train")))
        with progress("clean", total=sum(file.bytes for file in files), unit="B") as bar:
            for file in files:
                for text in self._texts(file, bar.update):
                    if text and not text.isspace():
                        yield Document(text, file.split)

    def _texts(self, file: RawFile, tick: Tick) -> Iterator[str]:
        if file.name.lower().endswith(".jsonl"):
            return self._json_texts(file.name, tick)
        chunks = self._repaired(file.name, tick)
        if self.newlines:
            chunks = self._with_newlines(chunks)
        if self.start:
            return self._split_before(chunks, self.start)
        return self._split_at(chunks, self.separator)

    def _json_texts(self, name: str, tick: Tick) -> Iterator[str]:
        with open(self.folder / name, "rb") as file:
            for number, line in enumerate(file, 1):
                tick(len(line))
                if line.strip():
                    chunks: Iterable[str] = [self._json_text(line, name, number)]
                    yield from self._split_at(self._with_newlines(chunks) if self.newlines else chunks, None)

    def _json_text(self, line: bytes, name: str, number: int) -> str:
        try:
            text = json.loads(self._repair(line.decode("utf-8", "surrogateescape"), name))["text"]
            return self._repair(text, name)  # "\ud800" in JSON is half a character
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{self.folder / name} line {number} is not a JSON object with a "text": mend the source or rename it'
            ) from None

    def _repaired(self, name: str, tick: Tick) -> Iterator[str]:
        """The file as text in chunks, each byte that is no UTF-8 made U+FFFD and counted."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        with open(self.folder / name, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                tick(len(chunk))
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
        r"""The same text with "\n" for every "\r\n" and "\r", also where a chunk ends between the two."""
        decoder = io.IncrementalNewlineDecoder(None, translate=True)
        for chunk in chunks:
            self.counts["newlines_changed"] += chunk.count("\r")
            yield decoder.decode(chunk)
        yield decoder.decode("", final=True)

    def _split_at(self, chunks: Iterable[str], separator: str | None) -> Iterator[str]:
        """Documents between separators, without the line ends around these; the whole text where there is none."""
        rest = ""
        for chunk in chunks:
            rest += chunk
            if separator:
                *whole, rest = rest.split(separator)  # `rest` may end with a part of the next separator
                yield from (text.strip("\n") for text in whole)
            while len(rest) > MOST_CHARACTERS + len(separator or ""):
                piece, rest = self._cut(rest)
                yield piece
        yield rest.strip("\n") if separator else rest

    def _split_before(self, chunks: Iterable[str], start: re.Pattern[str]) -> Iterator[str]:
        """Documents that begin with a line like `start`; white space before the first one belongs to it."""
        document: list[str] = []
        size = 0
        for line in _lines(chunks):
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


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    r"""Lines with their "\n", which alone ends one here."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest
