"""The clean stage: from raw files to clean, unique documents in three splits."""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import regex

from tinygpt.corpus.documents import Reader, raw_shards
from tinygpt.corpus.duplicates import Mask, came_before, near_duplicates
from tinygpt.corpus.folders import SPLITS, Manifest, read_manifest
from tinygpt.corpus.sources import SOURCES
from tinygpt.corpus.split import NOWHERE, Assigned, Cleaned, Shares, check_held_out, save_cleaned, split_cleaned
from tinygpt.errors import UserError, shown
from tinygpt.files import atomic_folder, human_bytes
from tinygpt.params import Count, Fraction, Within, require
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import Shard, shard_results

LEAST_TRAIN_BYTES = 1000  # less text cannot train a tokenizer or a model

# C0 and C1 control characters and the byte order mark; the `newlines` rule handles "\r".
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
ACCENTS = regex.compile(r"\p{M}{100}")  # Python takes quadratic time to sort a row of them

EVALUATION_FIRST = ("test", "val", "train")  # the first of equal documents stays, so training loses what it shares


class Report(NamedTuple):
    """What the stage reports."""

    counts: dict[str, int]  # by rule, for reports/clean.json
    repaired: dict[str, int]  # bytes that were not UTF-8, by file
    split: str  # how the documents were split: hash, tail or source


@dataclass(frozen=True, kw_only=True)
class CleanParams:
    """The `clean` group of params.yaml."""

    group: ClassVar[str] = "clean"

    separator: str | None  # the text between two documents of a file; null = as the source says, else none
    newlines: bool  # make \r\n and \r into \n
    control_characters: bool  # remove control characters except \n, \t, \r, and byte order marks
    unicode_nfc: bool  # compose characters (Unicode NFC): "e" and its accent become one "é"
    min_bytes: Count  # UTF-8 bytes; shorter documents are dropped
    exact_duplicates: bool  # drop a document that came before
    # drop a document at least this similar to an earlier one (Jaccard of word 5-grams); null = off
    near_duplicates: Annotated[float, Within("(0, 1]")] | None
    split: Literal["auto", "hash", "tail", "source"]  # hash: by document; tail: by position; auto: whichever fits
    val_fraction: Fraction  # share of validation text, for hash (of documents) and tail (of characters)
    test_fraction: Fraction  # share of test text
    split_seed: Annotated[int, Within("[0, 9007199254740992)")]  # another seed chooses other documents, for hash

    def __post_init__(self) -> None:
        require(
            (
                self.val_fraction + self.test_fraction < 1,
                f"clean.val_fraction={self.val_fraction} and clean.test_fraction={self.test_fraction} must sum to "
                "less than 1",
            ),
            (self.separator != "", "clean.separator is empty: set it to a text or null"),
            (
                not (self.newlines and "\r" in (self.separator or "")),
                f"clean.separator={shown(self.separator or '')} never occurs, as clean.newlines makes \\r\\n "
                "and \\r into \\n: write it with \\n",
            ),
        )

    def rules_with(self, groups: Mapping[str, Any]) -> Iterable[tuple[bool, str]]:
        """The rule that split=source needs a source with official splits."""
        if "download" in groups:
            source = groups["download"].source
            yield (
                self.split != "source" or (source in SOURCES and bool(SOURCES[source].splits)),
                f"clean.split=source needs a source with official splits, and download.source={source} has none: "
                "set clean.split to auto",
            )


def compose_characters(text: str, _: bool) -> tuple[str, int]:
    """The text in Unicode's form NFC, and 1 if that changed it; a text with a long row of accents stays as it is."""
    if unicodedata.is_normalized("NFC", text) or ACCENTS.search(text):
        return text, 0
    return unicodedata.normalize("NFC", text), 1


def drop_short(text: str, min_bytes: int) -> tuple[str | None, int]:
    """Drop a text of fewer than `min_bytes`, or of white space only."""
    is_short = len(text.encode()) < min_bytes or text.isspace()
    return (None, 1) if is_short else (text, 0)


# Rules for single texts, in order: param -> (name of its count in the report, rule). A rule takes a text and the
# param's value; it returns the new text, or None to drop it, and the number of changes. False and null turn a rule off.
TEXT_RULES: dict[str, tuple[str, Callable[[str, Any], tuple[str | None, int]]]] = {
    "control_characters": ("control_removed", lambda text, _: CONTROL.subn("", text)),
    "unicode_nfc": ("nfc_changed", compose_characters),
    "min_bytes": ("too_short", drop_short),
}
# Rules that compare documents, in order: param -> rule. A rule takes all documents, the mask of those kept so far and
# the param's value; it returns the mask of those to drop.
CORPUS_RULES: dict[str, Callable[[Cleaned, Mask, Any], Mask]] = {
    "exact_duplicates": lambda cleaned, kept, _: came_before(cleaned.facts["digest"]),
    "near_duplicates": lambda cleaned, kept, threshold: near_duplicates(cleaned.signatures, kept, threshold),
}


def clean(
    params: CleanParams,
    raw: Path,
    clean_folder: Path,
    runtime: RuntimeParams,
    *,
    evaluated: str | None = None,
    runs: Path | None = None,
) -> Report:
    """Fill `clean_folder` with train.jsonl, val.jsonl and test.jsonl; `runs` keeps the work of an interrupted run.

    Raises UserError if almost no text is left, naming the params that dropped documents, and if the later stages would
    find no text to validate on, or none in the split `evaluated`.
    """
    manifest = read_manifest(raw)
    files = manifest.files
    if params.split == "source":
        files = tuple(sorted(files, key=lambda file: EVALUATION_FIRST.index(file.split or "train")))
    reader = Reader(raw, manifest, separator=params.separator, newlines=params.newlines)
    shards = [*raw_shards(reader, files)]
    small = dataclasses.replace(manifest, files=(), downloads=())  # it travels to a worker with every shard
    work = partial(clean_shard, params=params, raw=raw.absolute(), manifest=small)
    key = [dataclasses.asdict(params), dataclasses.asdict(manifest), str(shards), unicodedata.unidata_version]
    only = [shard for shard, _ in shards]
    with shard_results(work, only, name="clean", key=key, code=__name__, runtime=runtime, runs=runs) as paths:
        cleaned = Cleaned(paths)
        counts, repaired = cleaned.counts()
        official = [SPLITS.index(split) if split else NOWHERE for _, split in shards]
        with atomic_folder(clean_folder) as folder:
            by_document = np.repeat(np.array(official, np.int8), cleaned.n_documents)
            how = _choose(cleaned, by_document, params, counts, folder)
            _check_result(params, counts)
            if evaluated:
                check_held_out({split: counts[f"{split}_documents"] for split in SPLITS}, evaluated)
    counts |= {"repaired_bytes": repaired.total(), "repaired_files": len(repaired)}
    reported = [
        *("documents_in", "bytes_in", "repaired_bytes", "repaired_files", "newlines_changed", "long_cut"),
        *(counted for counted, _ in TEXT_RULES.values()),
        *CORPUS_RULES,
        "leaked",
        *(f"{split}_{what}" for split in SPLITS for what in ("documents", "bytes")),
    ]
    return Report({name: counts[name] for name in reported}, dict(repaired), how)


def clean_shard(shard: Shard, path: Path, *, params: CleanParams, raw: Path, manifest: Manifest) -> None:
    """Clean the documents of a shard of raw files into a folder that `Cleaned` reads."""
    reader = Reader(raw, manifest, separator=params.separator, newlines=params.newlines)
    texts = (clean_text(text, params, reader.counts) for text in reader.iter_texts(shard))
    kept = (text for text in texts if text is not None)
    counts = {"rules": reader.counts, "repaired": reader.repaired}
    save_cleaned(path, kept, counts, seed=params.split_seed, sign=params.near_duplicates is not None)


def clean_text(text: str, params: CleanParams, counts: Counter[str]) -> str | None:
    """Apply TEXT_RULES to one document and count their changes.  -> the new text, or None if a rule drops it"""
    for param, (counted, rule) in TEXT_RULES.items():
        if value := getattr(params, param):
            found, n = rule(text, value)
            counts[counted] += n
            if found is None:
                counts[f"clean.{param}"] += 1
                return None
            text = found
    return text


def _choose(cleaned: Cleaned, official: Assigned, params: CleanParams, counts: Counter[str], folder: Path) -> str:
    """Write the documents, but only the first of duplicates, into their splits.  -> how they were split"""
    kept = np.ones(len(cleaned.facts), np.bool_)
    for param, rule in CORPUS_RULES.items():
        if value := getattr(params, param):
            dropped = rule(cleaned, kept, value)
            counts[param] = counts[f"clean.{param}"] = int(np.count_nonzero(dropped & kept))
            kept &= ~dropped
    shares = Shares(params.val_fraction, params.test_fraction)
    how, written = split_cleaned(cleaned, kept, official, params.split, shares, folder)
    counts.update(written)
    return how


def _check_result(params: CleanParams, counts: Counter[str]) -> None:
    if params.separator and not counts["separators"]:
        raise UserError(f"clean.separator={shown(params.separator)} is in none of the texts: fix it or set it to null")
    if not counts["documents_in"]:
        raise UserError("the text is empty, or only white space: set download.source to another one")
    if counts["train_bytes"] < LEAST_TRAIN_BYTES:
        left = human_bytes(counts["train_bytes"])
        dropped = [f"{param} dropped {n}" for param, n in counts.items() if param.startswith("clean.") and n]
        dropped += [f"{counts['leaked']} are also in val or test"] if counts["leaked"] else []
        found = ", ".join([f"documents read: {counts['documents_in']}", *dropped])
        raise UserError(
            f"only {left} of text left to train on, at least {human_bytes(LEAST_TRAIN_BYTES)} needed "
            f"({found}): add more text, set clean.separator if a file holds several documents, or lower "
            "clean.min_bytes, clean.val_fraction and clean.test_fraction"
            + ("" if params.split == "auto" else ", or set clean.split=auto for one long text")
        )
