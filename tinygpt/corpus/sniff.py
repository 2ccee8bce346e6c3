"""What a file holds, told by its beginning: text in which encoding, JSON lines, or no text."""

from __future__ import annotations

import codecs
import re

from charset_normalizer import from_bytes

from tinygpt.corpus.jsonl import json_object

SNIFF_BYTES = 65_536  # what a guess looks at
SNIFF_LINES = 20
MOST_BAD = 0.001  # share of bytes that are not UTF-8 in a text that is; and of what is not ASCII, a tenth
UNICODE = ["utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be"]  # in which zeros are a part of text
ENCODINGS = ["cp1252", "cp1250", "cp1251", "koi8_r", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"]

BAD_BYTE = re.compile("[\udc80-\udcff]")
BEYOND_ASCII = re.compile("[^\0-\x7f\udc80-\udcff]")
JSON_TEXT = re.compile(rb'\s*\{.{,10000}?"text"\s*:\s*"', re.DOTALL)


def encoding_of(head: bytes, declared: str | None) -> str | None:
    """How the text that begins so is encoded: in UTF-8 or as `declared`.  None where it is neither, or not text.

    What could be both is UTF-8 where it has more of its characters than of bytes that are none.
    """
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)  # without half a character at its end
    bad = len(BAD_BYTE.findall(text)) if not head.isascii() else 0
    good = len(BEYOND_ASCII.findall(text)) if bad or declared else 0
    is_utf8 = "\0" not in text and bad <= 1 + MOST_BAD * len(head) + good / 10
    if declared and (not is_utf8 or (bad >= good and "a".encode(declared) == b"a")) and _is_text(head, declared):
        return declared
    return "utf-8" if is_utf8 else None


def _is_text(head: bytes, encoding: str) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder(encoding)().decode(head)
    except ValueError:
        return False


def likely_encoding(head: bytes) -> str | None:
    """A guess what a text is encoded in that is not UTF-8; None for what is hardly a text."""
    head = head[:SNIFF_BYTES]
    match = from_bytes(head, cp_isolation=UNICODE if b"\0" in head else ENCODINGS).best()
    if match is None:
        return None
    western = head.decode("cp1252", "replace") == str(match)  # others differ from it in few characters
    return "cp1252" if western else match.encoding


def json_kind(head: bytes) -> str | None:
    """What a text is by its first lines: "lines" of JSON with a text, "other" JSON of a document after the other."""
    whole = head[: head.rfind(b"\n") + 1] or head
    first = [line for line in whole.split(b"\n", SNIFF_LINES)[:SNIFF_LINES] if line.strip()]
    found = [json_object(line) for line in first]
    if found and None not in found:
        has_text = all(isinstance((each or {}).get("text"), str) for each in found)
        return "lines" if has_text else "other" if len(found) > 1 else None
    if len(first) == 1 and JSON_TEXT.match(first[0]):  # a line longer than the beginning
        return "lines"
    return "other" if re.match(rb"\s*\[\s*\{", head) and re.search(rb'"text"\s*:', head) else None
