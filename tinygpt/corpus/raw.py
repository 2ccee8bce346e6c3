"""Copy texts into data/raw: recognized by their beginning, converted to UTF-8, and cut when there is enough.

A file is text in some encoding, or JSON lines with {"text": …} in each; other fields are ignored.
"""

import codecs
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, AnyStr

from charset_normalizer import from_bytes

from tinygpt.corpus.archive import READERS
from tinygpt.corpus.folders import TEXTS, RawFile
from tinygpt.corpus.local import LEFT_OUT, READ, Notes
from tinygpt.corpus.sources import MOST_NAME
from tinygpt.errors import UserError, printable
from tinygpt.files import human_bytes, sha256_file

MOST_PATH = 1000  # bytes
MOST_LINE = 64 << 20  # bytes: to parse a line takes up to nine times its size in memory
SNIFF_BYTES = 65_536  # that an encoding is guessed from
SNIFF_LINES = 20
MOST_GUESSES, MOST_WORD = 2, 20  # encodings named, and characters of a word that shows how they read a text
MOST_SHOWN = 80  # bytes of a bad line
MOST_BAD = 0.001  # share of invalid bytes that UTF-8 text may have, plus one for every ten characters beyond ASCII
UNICODE = ["utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be"]  # with zero bytes in their text
ENCODINGS = ["cp1252", "cp1250", "cp1251", "koi8_r", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"]

BAD_BYTE = re.compile("[\udc80-\udcff]")
BEYOND_ASCII = re.compile("[^\0-\x7f\udc80-\udcff]")
JSON_SPACE = re.compile(r"[\s,:]*")
DECODER = json.JSONDecoder(parse_int=float)  # int() refuses numbers of thousands of digits


class RawFolder:
    """Copies texts into a raw folder, at most `max_bytes` of each official split, and lists them in `files`.

    `notes` say which files were left out, and which were read as something other than their names say.
    """

    def __init__(self, folder: Path, max_bytes: int | None, encoding: str | None = None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.encoding = encoding  # of files that are not UTF-8
        self.files: list[RawFile] = []
        self.notes = Notes()
        self._taken: dict[str | None, int] = {}  # split -> UTF-8 bytes of text so far

    def is_full(self, splits: Collection[str]) -> bool:
        """Whether these splits, or the texts without a split, have reached `max_bytes`, so that no more is read."""
        taken = [self._taken.get(split, 0) for split in splits or (None,)]
        return self.max_bytes is not None and min(taken) >= self.max_bytes

    def add(self, name: str, chunks: Iterator[bytes], *, url: str | None = None, split: str | None = None) -> None:
        """Copy one file as UTF-8, cut after a whole document (.jsonl) or line when `max_bytes` is reached."""
        limit = None if self.max_bytes is None else self.max_bytes - self._taken.get(split, 0)
        head = next(chunks, b"")
        if limit == 0:
            return
        if not name.isprintable():
            self.notes.add(READ, "under this name", name)
        name = printable(name)
        encoding = encoding_of(head, self.encoding)
        if encoding is None or not head:
            self._leave_unread(name, head)
            return
        chunks = itertools.chain([head], chunks)
        if encoding != "utf-8":
            chunks = self._as_utf8(chunks, encoding, name)
            chunks = itertools.chain([head := next(chunks, b"")], chunks)
        if not name.lower().endswith(".jsonl") and (kind := json_kind(head)):
            self.notes.add(READ, "as JSON lines" if kind == "lines" else "as plain text, though JSON", name)
            name = f"{name}.jsonl" if kind == "lines" else name  # so that `clean` reads it as JSON lines
        copy = _copy_jsonl if name.lower().endswith(".jsonl") else _copy_text
        with self._create(name) as file:
            taken = copy(file, chunks, limit, name)
        self._taken[split] = self._taken.get(split, 0) + taken
        path = Path(file.name)
        file_bytes = path.stat().st_size
        self.files.append(RawFile(name=name, url=url, bytes=file_bytes, sha256=sha256_file(path), split=split))

    def _leave_unread(self, name: str, head: bytes) -> None:
        is_packed = name.lower().endswith(tuple(READERS))
        if not head:
            self.notes.add(LEFT_OUT, "empty", name)
        elif self.encoding and not is_packed and b"\0" not in head:
            self.notes.add(LEFT_OUT, f"neither UTF-8 nor {self.encoding}", name)
        elif likely := likely_encodings(head):
            found = " or ".join(f"{encoding} (`{word}`)" if word else encoding for encoding, word in likely.items())
            which = f"={found}" if len(likely) == 1 else " to the one that reads well"
            self.notes.add(LEFT_OUT, "not UTF-8", f"{name} looks like {found}: set download.encoding{which}")
        else:
            self.notes.add(LEFT_OUT, "packed twice" if is_packed else "binary", name)

    def _as_utf8(self, chunks: Iterator[bytes], encoding: str, name: str) -> Iterator[bytes]:
        """The text in UTF-8, of a file that may be UTF-8 after all: its first characters beyond ASCII decide."""
        begins_alike = _extends_ascii(encoding)
        for chunk in chunks:
            if not (begins_alike and chunk.isascii()):
                chunk += next(chunks, b"")  # as it may end in the middle of its only such character
                rest = itertools.chain([chunk], chunks)
                if encoding_of(chunk, encoding) == "utf-8":
                    yield from rest
                else:
                    self.notes.add(READ, f"as {encoding}", name)
                    yield from _recoded(rest, encoding, name)
                return
            yield chunk

    def _create(self, name: str) -> IO[bytes]:
        path = self.folder / TEXTS / PurePosixPath(name)
        if max(len(part.encode()) for part in path.parts) > MOST_NAME or len(name.encode()) > MOST_PATH:
            raise UserError(f"the file name {name[:MOST_NAME]}… is too long: rename it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb")
        except (FileExistsError, NotADirectoryError):  # an archive is a folder here
            raise UserError(
                f"download.source holds two files named {name}, or a file and an archive of that name: rename one"
            ) from None


def _recoded(chunks: Iterable[bytes], encoding: str, name: str) -> Iterator[bytes]:
    """The same text in UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError:
        raise UserError(f"download.encoding={encoding} cannot decode {name}: set another, or repair the file") from None


def _extends_ascii(encoding: str) -> bool:
    """Whether every byte of ASCII means in this encoding what it means in ASCII, whatever follows it."""
    ascii_bytes = bytes([*range(128), *rb"\u0041", *b"\x1b$B"])  # an escape, and ISO 2022's switch to Japanese
    with suppress(ValueError):
        return ascii_bytes.decode(encoding) == ascii_bytes.decode()
    return False


def _copy_text(file: IO[bytes], chunks: Iterable[bytes], limit: int | None, name: str) -> int:
    """Copy whole lines up to `limit` bytes, or characters if the first line is longer.  -> bytes of the limit used"""
    size = border = 0
    last = b""
    for chunk in chunks:
        kept = chunk if limit is None else chunk[: limit - size]
        file.write(kept)
        border = size + newline + 1 if (newline := kept.rfind(b"\n")) >= 0 else border
        size += len(kept)
        last = (last + kept)[-4:]  # no character has more bytes
        if len(kept) < len(chunk):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(last)
            begun = len(decoder.getstate()[0])  # bytes of an incomplete character
            file.truncate(border or size - begun)
            return limit or 0
    return size


def _copy_jsonl(file: IO[bytes], chunks: Iterable[bytes], limit: int | None, name: str) -> int:
    """Copy whole lines whose texts have up to `limit` bytes together.  -> bytes of the limit used"""
    size = 0
    for number, line in enumerate(lines(chunks, b"\n", MOST_LINE), 1):
        if len(line) > MOST_LINE:
            raise bad_line(name, number, line)
        if limit is not None and line.strip():
            if (text := line_text(line)) is None:
                raise bad_line(name, number, line)
            size += len(text.encode("utf-8", "replace"))
            if size > limit:
                return limit
        file.write(line)
    return size


def encoding_of(head: bytes, declared: str | None) -> str | None:
    """The encoding of a text that begins with `head`: UTF-8 or `declared`; None if it is neither, or not text.

    If it could be either, it is UTF-8 if it has more characters beyond ASCII than bytes that are not UTF-8.
    """
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)  # drops half a character at its end
    bad = len(BAD_BYTE.findall(text)) if not head.isascii() else 0
    good = len(BEYOND_ASCII.findall(text)) if bad or declared else 0
    is_utf8 = "\0" not in text and bad <= 1 + MOST_BAD * len(head) + good / 10
    if declared and (not is_utf8 or (bad >= good and "a".encode(declared) == b"a")):
        with suppress(ValueError):
            if "\0" not in codecs.getincrementaldecoder(declared)().decode(head):
                return declared
    return "utf-8" if is_utf8 else None


def likely_encodings(head: bytes) -> dict[str, str]:
    """Guesses at the encoding of a text that is not UTF-8, the best first; none if it is hardly text.

    -> for each of several a word of the text that they read differently: {"cp1250": "ańadir", "cp1252": "añadir"}
    """
    head = head[:SNIFF_BYTES]
    found = from_bytes(head, cp_isolation=UNICODE if b"\0" in head else ENCODINGS)
    texts = {"cp1252" if "cp1252" in each.could_be_from_charset else each.encoding: str(each) for each in found}
    texts = dict(itertools.islice(texts.items(), MOST_GUESSES))
    words = zip(*([word[:MOST_WORD] for word in text.split()] for text in texts.values()), strict=False)
    differing = next((each for each in words if len({*each}) > 1), [""] * len(texts))
    return {encoding: printable(word) for encoding, word in zip(texts, differing, strict=True)}


def json_kind(head: bytes) -> str | None:
    """Whether the first lines are JSON: "lines" if each has a text, "other" for other JSON documents, else None."""
    whole = head[: head.rfind(b"\n") + 1] or head
    first = [line for line in whole.split(b"\n", SNIFF_LINES)[:SNIFF_LINES] if line.strip()]
    found = [json_object(line) for line in first]
    if found and None not in found:
        has_text = all(isinstance((each or {}).get("text"), str) for each in found)
        return "lines" if has_text else "other" if len(found) > 1 else None
    if len(first) == 1 and _begins_with_text(first[0]):  # a line longer than `head`
        return "lines"
    return "other" if re.match(rb"\s*\[\s*\{", head) and re.search(rb'"text"\s*:', head) else None


def _begins_with_text(begin: bytes) -> bool:
    """Whether the beginning of a JSON object shows that it has a text: not one of an object inside it."""
    line = begin.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").lstrip()
    at, key, is_value = 1, None, False
    while line.startswith("{"):
        at = JSON_SPACE.match(line, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if is_value and key == "text":
            return line.startswith('"', at)
        try:
            key, at = DECODER.raw_decode(line, at)
        except (ValueError, RecursionError):
            return False
        is_value = not is_value
    return False


def lines(chunks: Iterable[AnyStr], newline: AnyStr, most: int) -> Iterator[AnyStr]:
    """Lines with their ends, which are `newline` only; a line longer than `most` and a chunk comes in several parts."""
    begun: list[AnyStr] = []
    for chunk in chunks:
        parts = chunk.split(newline)
        for line in parts[:-1]:
            yield newline[:0].join(begun) + line + newline
            begun = []
        begun.append(parts[-1])
        if sum(map(len, begun)) > most:
            yield newline[:0].join(begun)
            begun = []
    if any(begun):
        yield newline[:0].join(begun)


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None; bytes that are not UTF-8 become half characters (surrogates)."""
    try:
        found = DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def line_text(line: bytes) -> str | None:
    """The text in a JSON line, or None."""
    text = (json_object(line) or {}).get("text")
    return text if isinstance(text, str) else None


def bad_line(name: str, number: int, line: bytes) -> UserError:
    """The error for a line without a text, or that is too long."""
    if len(line) > MOST_LINE:
        return UserError(
            f"{name} line {number:,} is longer than {human_bytes(MOST_LINE)}: split its text into several lines"
        )
    begin = line[:MOST_SHOWN].decode(errors="replace").rstrip() + ("…" if len(line) > MOST_SHOWN else "")
    # lines of JSON are recognized under any name, by the first of them
    advice = "rename the file to have it read as plain text" if number <= SNIFF_LINES else "remove it"
    return UserError(
        f'{name} line {number:,} is not a JSON object with a text named "text" (`{begin}`): fix it, or {advice}'
    )
