"""The corpus on disk: data/raw has text files and a manifest, data/clean a file of texts for each split."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from json.encoder import encode_basestring
from pathlib import Path, PurePosixPath

from tinygpt.errors import UserError
from tinygpt.files import must_exist, read_json, write_json
from tinygpt.params import ParamsError, from_mapping, require
from tinygpt.shards import Shard, Span

MANIFEST = "manifest.json"
TEXTS = "texts"  # a subfolder of data/raw, so that no text can take the manifest's name
SPLITS = ("train", "val", "test")  # each has a file in data/clean, and in data/tokens

SHARD_BYTES = 4_000_000  # of one shard, at least
MOST_SHARDS = 4096  # approximately


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawFile:
    """One text file, named relative to `data/raw/texts`."""

    name: str
    url: str | None  # where it, or its archive, was downloaded from; None for a local or embedded file
    bytes: int
    sha256: str
    split: str | None  # train, val or test if the source has official splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawDownload:
    """A downloaded file, before it was unpacked."""

    url: str
    sha256: str | None  # None where only its beginning was read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in data/raw.  No times and no local paths, so the same source gives the same bytes."""

    source: str
    licence: str
    separator: str | None  # the text between two documents of a file; None = a file is one document
    document_start: str | None  # regular expression for the first line of a document
    python: str | None  # the version whose documentation this is; None for other sources
    downloads: tuple[RawDownload, ...]
    files: tuple[RawFile, ...]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a raw folder."""
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read a raw folder's manifest.  Raises UserError when it is missing, broken or of another version."""
    try:
        manifest = from_mapping(Manifest, read_json(folder / MANIFEST, stage="download"))
        re.compile(manifest.document_start or "")
        paths = [PurePosixPath(file.name) for file in manifest.files]
        require(*((not path.is_absolute() and ".." not in path.parts, f"{path} is outside it") for path in paths))
        return manifest
    except (ParamsError, re.error) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged or from another version of tinygpt ({error}): run `dvc repro -f download`"
        ) from None


def split_file(folder: Path, split: str) -> Path:
    """The file of a split in data/clean.  Raises UserError if clean has not written it."""
    return must_exist(folder / f"{split}.jsonl", stage="clean")


def text_line(text: str) -> str:
    """The JSON line for `text`, as json.dumps(…, ensure_ascii=False) writes it, but faster."""
    return f'{{"text": {encode_basestring(text)}}}\n'


def iter_texts(path: Path, *, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """The texts in a file of data/clean whose lines begin in bytes [begin, end), one at a time.

    Raises UserError naming the byte where a line is not a document.
    """
    with open(must_exist(path, stage="clean"), "rb") as file:  # binary, where only "\n" ends a line
        file.seek(begin)
        while (end is None or begin < end) and (line := file.readline()):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path} has no {{"text": …}} document at byte {begin:,}: run `dvc repro clean`')
            yield text
            begin += len(line)


def shard_bytes(total: int) -> int:
    """The smallest size in bytes of a shard, for a corpus of `total` bytes."""
    return max(SHARD_BYTES, total // MOST_SHARDS)


def cut_lines(path: Path) -> list[Shard]:
    """A file cut at line ends into shards of about the same size; none for an empty file."""
    bounds = [0, *line_ends(path, shard_bytes(path.stat().st_size))]
    return [Shard((Span(path.absolute(), begin, end),)) for begin, end in pairwise(bounds)]


def line_ends(path: Path, n_bytes: int) -> Iterator[int]:
    """Line ends of a file, each at least `n_bytes` after the one before, and the end of the file."""
    size, end = path.stat().st_size, 0
    with open(path, "rb") as file:
        while end < size:
            file.seek(end + n_bytes - 1)
            file.readline()
            end = min(file.tell(), size)
            yield end


def thin(shards: Sequence[Shard], max_bytes: int) -> list[Shard]:
    """The beginning of each span, at most `max_bytes` together; whole spans if they have no more than that."""
    share = min(1.0, max_bytes / max(1, sum(shard.size for shard in shards)))
    return [
        Shard(tuple(Span(span.path, span.begin, span.begin + int(span.size * share)) for span in shard.spans))
        for shard in shards
    ]


def shard_texts(shard: Shard) -> Iterator[str]:
    """The texts of a shard of a file in data/clean, with no more characters than the shard has bytes.

    So a text is cut only where `thin` has cut the shard.
    """
    for span in shard.spans:
        room = span.size
        for text in iter_texts(span.path, begin=span.begin, end=span.end):
            yield text[:room]
            room = max(0, room - len(text))
