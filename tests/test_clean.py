"""From data/raw to clean documents: each rule on examples, and properties that hold for every text."""

import dataclasses
import json
import os
import random
import resource
import time
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import RUNTIME
from hypothesis import assume, given
from hypothesis import strategies as st
from project import SMALL, make_project, run_stages

from tinygpt.corpus import documents, duplicates
from tinygpt.corpus.clean import (
    CONTROL,
    LEAST_TRAIN_BYTES,
    TEXT_RULES,
    CleanParams,
    Report,
    _check_result,
    clean,
    clean_text,
)
from tinygpt.corpus.documents import Reader, raw_shards
from tinygpt.corpus.duplicates import near_duplicates, shingles, signature
from tinygpt.corpus.folders import SPLITS, Manifest, RawFile, iter_texts, read_manifest, text_line, write_manifest
from tinygpt.corpus.raw import RawFolder
from tinygpt.corpus.sources import SOURCES
from tinygpt.errors import UserError
from tinygpt.params import ParamsError, from_mapping

OFF = {
    "separator": None,
    "newlines": False,
    "control_characters": False,
    "unicode_nfc": False,
    "min_bytes": 1,
    "exact_duplicates": False,
    "near_duplicates": None,
    "split": "tail",
    "val_fraction": 0.0,
    "test_fraction": 0.0,
    "split_seed": 0,
}
ON = {**OFF, "newlines": True, "control_characters": True, "unicode_nfc": True, "exact_duplicates": True}
LONG = "".join(f"{i} is a number.\n" for i in range(100)).encode()  # enough text for a train split


def params(**changes: object) -> CleanParams:
    """Params with every rule off except the changes."""
    return from_mapping(CleanParams, {**OFF, **changes}, prefix="clean.")


def make_raw(folder: Path, files: dict[str, bytes], **changes: object) -> Path:
    """A raw folder as the download stage writes it; files `val.txt` and so on have that official split."""
    entries = []
    for name, content in files.items():
        path = folder / "raw" / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        split = path.stem if path.stem in SPLITS else None
        entries.append(
            RawFile(name=name, url=None, bytes=len(content), sha256=sha256(content).hexdigest(), split=split)
        )
    manifest = {"separator": None, "document_start": None, "python": None, **changes}
    write_manifest(
        folder / "raw", Manifest(source="own", licence="unknown", downloads=(), files=tuple(entries), **manifest)
    )
    return folder / "raw"


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep runs/ out of the checkout."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


@pytest.mark.parametrize("name", ["../a.txt", "b/../../a.txt", "/etc/passwd"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    raw = make_raw(tmp_path, {"a.txt": b"a"})
    text = (raw / "manifest.json").read_text()
    (raw / "manifest.json").write_text(text.replace('"a.txt"', json.dumps(name)))
    with pytest.raises(UserError, match=f"{name} is outside it.*dvc repro -f download"):
        read_manifest(raw)


def run(folder: Path, files: dict[str, bytes], **changes: object) -> Report:
    return clean(params(**changes), make_raw(folder, files), folder / "clean", RUNTIME)


def train_texts(folder: Path) -> list[str]:
    return list(iter_texts(folder / "clean" / "train.jsonl"))


def reader(folder: Path, name: str, content: bytes, *, newlines: bool = True, **manifest: object) -> Reader:
    raw = make_raw(folder, {name: content}, **manifest)
    return Reader(raw, read_manifest(raw), separator=None, newlines=newlines)


def read(folder: Path, content: bytes, *, name: str = "x.txt", **changes: object) -> list[str]:
    """The documents of one file."""
    return texts_of(reader(folder, name, content, **changes), folder / "raw")


def texts_of(made: Reader, raw: Path) -> list[str]:
    """Everything that a reader finds in a raw folder."""
    return [text for shard, _ in raw_shards(made, read_manifest(raw).files) for text in made.iter_texts(shard)]


# The params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separator": ""}, "clean.separator is empty"),
        ({"separator": "\r\n--", "newlines": True}, "clean.separator=.* never occurs, as clean.newlines makes"),
        ({"newlines": "yes"}, "clean.newlines=yes must be true or false"),
        ({"control_characters": 1}, "clean.control_characters=1 must be true or false"),
        ({"unicode_nfc": None}, "clean.unicode_nfc=null must be true or false"),
        ({"min_bytes": 0}, "clean.min_bytes=0 must be"),
        ({"exact_duplicates": "no"}, "clean.exact_duplicates=no must be true or false"),
        ({"near_duplicates": 0.0}, "clean.near_duplicates=0.0 must be"),
        ({"near_duplicates": 1.1}, "clean.near_duplicates=1.1 must be"),
        ({"split": "tial"}, "clean.split=tial is not one of .*did you mean tail"),
        ({"val_fraction": 1.0}, "clean.val_fraction=1.0 must be"),
        ({"test_fraction": -0.1}, "clean.test_fraction=-0.1 must be"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "clean.val_fraction=0.5 and clean.test_fraction=0.5 must sum"),
        ({"split_seed": -1}, "clean.split_seed=-1 must be"),
        ({"min_byte": 1}, "unknown key clean.min_byte"),
    ],
)
def test_bad_clean_params_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params(**changes)


# From files to documents


def test_a_plain_file_is_one_document_with_every_byte(tmp_path: Path) -> None:
    assert read(tmp_path, b"\n a \n\n\n b \n\n") == ["\n a \n\n\n b \n\n"]


def test_white_space_alone_is_not_a_document(tmp_path: Path) -> None:
    assert read(tmp_path, b" \n\t\n") == []


def test_a_separator_is_removed_with_the_line_ends_around_it(tmp_path: Path) -> None:
    stories = b"\none\n\nmore of it\n<|endoftext|>\n two \n\n\n<|endoftext|>\n<|endoftext|>\nthree"
    expected = ["one\n\nmore of it", " two ", "three"]
    assert read(tmp_path, stories, separator="<|endoftext|>") == expected
    assert read(tmp_path, stories.replace(b"\n", b"\r\n"), separator="<|endoftext|>") == expected


def test_blank_lines_can_separate(tmp_path: Path) -> None:
    assert read(tmp_path, b"a\nb\r\n\r\n\r\nc\n", separator="\n\n") == ["a\nb", "c"]


def test_the_separator_of_the_params_overrides_that_of_the_source(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"x.txt": b"a---b+++c"}, separator="+++", document_start="b")
    made = Reader(raw, read_manifest(raw), separator="---", newlines=True)
    assert texts_of(made, raw) == ["a", "b+++c"]


def test_without_a_separator_its_text_stays_text(tmp_path: Path) -> None:
    assert read(tmp_path, b"a<|endoftext|>b") == ["a<|endoftext|>b"]


def test_wikitext_articles_begin_at_their_titles_and_lose_no_byte(tmp_path: Path) -> None:
    start = SOURCES["wikitext-2"].document_start
    text = " \n = One = \n \n text \n = = Part = = \n \n x = y \n = = = Deep = = = \n \n = Two = \n \n text \n"
    found = read(tmp_path, text.encode(), document_start=start)
    assert [document.split("\n")[1 if i == 0 else 0] for i, document in enumerate(found)] == [" = One = ", " = Two = "]
    assert "".join(found) == text


@given(
    pieces=st.lists(st.sampled_from(["a", "é", "\n", "\r\n", "\r", "--", "-", "𝄞", " "]), max_size=30),
    chunk=st.integers(1, 7),
)
def test_where_the_chunks_end_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    content = "".join(pieces).encode()
    unix = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
    expected = [text for part in unix.split("--") if (text := part.strip("\n")) and not text.isspace()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", chunk)
        assert read(folder, content, separator="--") == expected


def test_json_lines_give_their_texts(tmp_path: Path) -> None:
    lines = [{"text": "a\r\nb\u2028c", "id": 1}, {"text": ""}, {"text": "<|endoftext|>"}]
    content = "\n\n".join(json.dumps(line) for line in lines).encode()
    assert read(tmp_path, content, name="x.jsonl") == ["a\nb\u2028c", "<|endoftext|>"]


def test_a_byte_order_mark_before_json_lines_is_skipped(tmp_path: Path) -> None:
    assert read(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}', name="x.jsonl") == ["a", "b"]


BAD_LINES = [
    b"{",
    b"hello",
    b"[]",
    b'"text"',
    b'{"txt": "a"}',
    b"{}",
    b'{"text": 7}',
    b'{"text": null}',
    b"[" * 200_000,
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_broken_json_line_is_named_and_shown(tmp_path, line):
    content = b'{"text": "a"}\n' + line + b'\n\n{"text": "b"}\n'
    shown = line.decode() if len(line) < 80 else "[" * 80 + "…"
    for find in (
        lambda: read(tmp_path, content, name="x.jsonl"),
        lambda: RawFolder(tmp_path / "limited", 100).add("x.jsonl", iter([content])),
    ):
        with pytest.raises(UserError) as caught:
            find()
        told = str(caught.value)
        assert told.startswith(f'x.jsonl line 2 is not a JSON object with a text named "text" (`{shown}`): fix it, or')


@pytest.mark.parametrize("chunk_bytes", [1, 2, 1 << 20])
def test_bytes_that_are_not_utf8_are_replaced_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
    made = reader(tmp_path, "x.txt", b"caf\xe9 \xc3\xa9 \xff\xfe \xed\xa0\x80 \xe2\x82")
    assert texts_of(made, tmp_path / "raw") == ["caf\ufffd é \ufffd\ufffd \ufffd\ufffd\ufffd \ufffd\ufffd"]
    assert made.repaired == {"x.txt": 8}


def test_half_characters_in_json_are_replaced_and_counted(tmp_path: Path) -> None:
    made = reader(tmp_path, "x.jsonl", b'{"text": "a\\ud800b\\ud83d\\ude00\xff"}')
    assert texts_of(made, tmp_path / "raw") == ["a\ufffdb😀\ufffd"]
    assert made.repaired == {"x.jsonl": 2}


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_gigantic_document_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 10)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 4)
    text = "1234\n678\n" + "x" * 25 + "\n" + "1234567890"
    made = reader(tmp_path, name, (text_line(text) if name.endswith("l") else text).encode())
    pieces = texts_of(made, tmp_path / "raw")
    assert "".join(pieces) == text
    assert pieces == ["1234\n678\n", "x" * 10, "x" * 10, "x" * 5 + "\n", "1234567890"]
    assert made.counts["long_cut"] == 4


def test_a_gigantic_article_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 10)
    text = b" = A = \n1234\n678\n9\n = B = \n"
    made = reader(tmp_path, "x.txt", text, document_start=SOURCES["wikitext-2"].document_start)
    assert texts_of(made, tmp_path / "raw") == [" = A = \n1234\n", "678\n9\n", " = B = \n"]
    assert made.counts["long_cut"] == 1


def test_a_document_that_just_fits_is_not_cut_where_a_chunk_ends_in_its_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 8)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 9)
    assert read(tmp_path, b"a\nbcdefg--x", separator="--") == ["a\nbcdefg", "x"]


def test_newlines_are_counted_and_can_be_left_as_they_are(tmp_path: Path) -> None:
    made = reader(tmp_path, "x.txt", b"a\r\nb\rc\n")
    assert texts_of(made, tmp_path / "raw") == ["a\nb\nc\n"]
    assert made.counts["newlines_changed"] == 2
    assert read(tmp_path, b"a\r\nb\rc\n", newlines=False) == ["a\r\nb\rc\n"]
    assert read(tmp_path, text_line("a\r\nb").encode(), name="x.jsonl", newlines=False) == ["a\r\nb"]


# The rules


def cleaned(text: str, **changes: object) -> tuple[str | None, Counter[str]]:
    counts: Counter[str] = Counter()
    return clean_text(text, params(**changes), counts), counts


# A rule for single texts -> its value, a text, that text cleaned (None: dropped), and how many changes are counted.
ROWS = {
    "control_characters": (True, "\ufeffa\0b\x1b[0m\tc\r\n\x7fd\x85e\x0cf\x9f", "ab[0m\tc\r\ndef", 7),
    "unicode_nfc": (True, "cafe\u0301 \u212b", "café Å", 1),
    "min_bytes": (5, "éé", None, 1),
}


@pytest.mark.parametrize("rule", TEXT_RULES)
def test_each_rule_changes_its_text_and_counts_that_unless_it_is_off(rule: str) -> None:
    value, text, expected, n = ROWS[rule]
    assert cleaned(text, **{rule: value}) == (
        expected,
        Counter({TEXT_RULES[rule][0]: n, f"clean.{rule}": int(not expected)}),
    )
    assert cleaned(text) == (text, Counter())
    assert cleaned("plain", **{rule: value}) == ("plain", Counter())


def test_a_new_rule_is_a_param_a_function_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithQuiet(CleanParams):
        quiet: int  # drop texts that shout more often

    def quieten(text: str, at_most: int) -> tuple[str | None, int]:
        return (None, 1) if text.count("!") > at_most else (text.replace("!", "."), text.count("!"))

    monkeypatch.setitem(TEXT_RULES, "quiet", ("shouts", quieten))
    made = from_mapping(WithQuiet, {**OFF, "quiet": 2}, prefix="clean.")
    raw = make_raw(tmp_path, {"a.txt": b"Oh! No!", "b.txt": b"Oh!!!", "c.txt": LONG})
    assert clean(made, raw, tmp_path / "clean", RUNTIME).counts["shouts"] == 3
    assert train_texts(tmp_path) == ["Oh. No.", LONG.decode()]
    raw = make_raw(tmp_path, {"a.txt": b"!!!" + LONG})
    with pytest.raises(UserError, match=r"documents read: 1, clean\.quiet dropped 1"):
        clean(made, raw, tmp_path / "clean", RUNTIME)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once, _ = cleaned(text, control_characters=True, unicode_nfc=True)
    assume(once is not None)
    twice, counts = cleaned(once, control_characters=True, unicode_nfc=True)
    assert twice == once
    assert not +counts


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_clean_text_is_nfc_without_control_characters(text: str) -> None:
    text, _ = cleaned(text, control_characters=True, unicode_nfc=True)
    assume(text is not None)
    assert unicodedata.is_normalized("NFC", text)
    assert not CONTROL.search(text)


def test_rows_of_accents_take_no_longer_than_other_text() -> None:
    text = "e\u0301" + "\u0301\u0316" * 500_000  # sorting them would take minutes
    started = time.process_time()
    assert cleaned(text, unicode_nfc=True)[0] == text
    assert cleaned("e" + "\u0316\u0301" * 40, unicode_nfc=True)[0] == unicodedata.normalize(
        "NFC", "e" + "\u0316\u0301" * 40
    )
    assert time.process_time() - started < 5


def test_short_documents_are_dropped_by_bytes(tmp_path: Path) -> None:
    files = {"a.txt": "é".encode(), "b.txt": b"ab", "c.txt": b"abc", "d.txt": LONG}
    assert run(tmp_path, files, min_bytes=3).counts["too_short"] == 2
    assert train_texts(tmp_path) == ["abc", LONG.decode()]


def test_of_exact_duplicates_the_first_stays(tmp_path: Path) -> None:
    files = {"a.txt": b"same\r\n", "b.txt": LONG, "c.txt": b"same\n", "d.txt": b"same \n"}
    assert run(tmp_path, files, newlines=True, exact_duplicates=True).counts["exact_duplicates"] == 1
    assert train_texts(tmp_path) == ["same\n", LONG.decode(), "same \n"]
    assert run(tmp_path, files, newlines=True).counts["exact_duplicates"] == 0
    assert len(train_texts(tmp_path)) == 4


def test_all_control_characters_of_unicode_are_removed_but_tabs_and_line_ends() -> None:
    text = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    kept = [c for c in text if c in "\t\n\r" or (c != "\ufeff" and unicodedata.category(c) != "Cc")]
    assert cleaned(text, control_characters=True)[0] == "".join(kept)


def test_a_text_of_which_only_white_space_is_left_is_dropped() -> None:
    assert cleaned("\x0c \n\0", control_characters=True)[0] is None


def words(n: int, seed: int) -> list[str]:
    return random.Random(seed).choices([f"word{i}" for i in range(1000)], k=n)


def test_of_near_duplicates_the_first_stays(tmp_path: Path) -> None:
    first, other = words(300, 1), words(300, 2)
    near = [*first[:297], "changed", *first[298:]]
    far = [*first[:150], *other[:150]]
    files = {f"{i}.txt": " ".join(text).encode() for i, text in enumerate((first, near, far, other))}
    assert run(tmp_path, files, near_duplicates=0.8).counts["near_duplicates"] == 1
    assert train_texts(tmp_path) == [" ".join(text) for text in (first, far, other)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_near_duplicates_follow_the_true_similarity(threshold: float) -> None:
    texts = []
    for i in range(50):
        first, rest = words(400, i), words(400, 1000 + i)
        texts.append(" ".join(first))
        for similarity in (threshold / 2, threshold + (1 - threshold) / 2):
            n_same = round(400 * 2 * similarity / (1 + similarity))
            texts.append(" ".join(first[:n_same] + rest[n_same:]))
    signatures = np.array([signature(text) for text in texts], np.uint32)
    everything = np.ones(len(texts), np.bool_)
    found = near_duplicates(lambda: iter([signatures]), everything, threshold)
    first, below, above = found.reshape(-1, 3).sum(axis=0)
    assert above >= 40  # the rest is what LEAST_RECALL and the estimate miss
    assert (first, below) == (0, 0)
    parts = np.array_split(signatures, 7)
    assert (near_duplicates(lambda: iter(parts), everything, threshold) == found).all()


def test_a_document_that_was_dropped_does_not_make_others_duplicates() -> None:
    signatures = np.array([signature(" ".join(words(100, seed))) for seed in (1, 1, 2, 1, 2)], np.uint32)
    kept = np.array([False, True, True, True, True])
    assert near_duplicates(lambda: iter([signatures]), kept, 0.8).tolist() == [False, False, False, True, True]


def near(threshold: float, *signatures: np.ndarray) -> list[bool]:
    part = np.array(signatures, np.uint32)
    return near_duplicates(lambda: iter([part]), np.ones(len(part), np.bool_), threshold).tolist()


def test_at_a_threshold_of_one_the_same_words_are_near_duplicates_and_no_others() -> None:
    texts = ["\n".join(words(100, 1)), *(" ".join(words(100, seed)) for seed in (2, 1))]
    assert near(1.0, *map(np.array, map(signature, texts))) == [False, False, True]


def test_a_near_duplicate_does_not_make_others_duplicates() -> None:
    first = np.arange(duplicates.HASHES)
    second = np.where(first < 8, first + 1000, first)  # seven eighths are the first's
    third = np.where(first >= 56, first + 2000, second)  # and here the second's, but three quarters the first's
    assert near(0.8, first, second, third) == [False, True, False]


def test_a_document_is_compared_with_every_earlier_one_that_shares_a_band() -> None:
    first = np.arange(duplicates.HASHES)
    other = np.where(first < 2, first, first + 1000)  # one of 32 bands is the first's
    third = np.where((first < 2) | ((first < 38) & (first % 2 == 0)), first, first + 2000)  # so are 20 of 64 values
    assert near(0.3, first, other, third) == [False, False, True]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.95])
def test_most_pairs_just_at_the_threshold_are_found(threshold: float) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(2**31, size=(300, duplicates.HASHES))
    n_other = int(duplicates.HASHES * (1 - threshold))
    second = [np.where(rng.permutation(duplicates.HASHES) < n_other, row + 1, row) for row in first]
    found = near(threshold, *first, *second)
    assert sum(found[:300]) == 0 and sum(found[300:]) > 0.55 * 300


def test_shingles_are_runs_of_five_words() -> None:
    assert shingles("a b c d e f".split()) == ["a b c d e", "b c d e f"]
    assert shingles(["a", "b"]) == ["a b"]


def test_a_signature_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(words(n, n)) for n in (1, 4, 5, 6, 7, 14, 15, 100)]
    whole = [signature(text) for text in texts]
    for n in (1, 3, 10):
        monkeypatch.setattr(duplicates, "PIECE_WORDS", n)
        assert [signature(text) for text in texts] == whole


def test_near_duplicates_are_the_same_in_every_run(tmp_path: Path) -> None:
    files = {f"{i:03}.txt": " ".join(words(60, i % 40) + words(i % 17, i)).encode() for i in range(120)}
    first = run(tmp_path, files, near_duplicates=0.7)
    texts = train_texts(tmp_path)
    assert 40 <= len(texts) < 120
    assert run(tmp_path, files, near_duplicates=0.7) == first
    assert train_texts(tmp_path) == texts


# The whole stage


def test_the_report_counts_every_rule(tmp_path: Path) -> None:
    files = {"a.txt": b"cafe\xcc\x81 \x00\xff\r\n", "b.txt": b"x", "c.txt": LONG, "d.txt": LONG}
    result = run(tmp_path, files, **{**ON, "min_bytes": 3})
    assert result.counts == {
        "documents_in": 4,
        "bytes_in": 12 + 1 + 2 * len(LONG),  # U+FFFD is three bytes
        "repaired_bytes": 1,
        "repaired_files": 1,
        "newlines_changed": 1,
        "control_removed": 1,
        "nfc_changed": 1,
        "long_cut": 0,
        "too_short": 1,
        "exact_duplicates": 1,
        "near_duplicates": 0,
        "leaked": 0,
        "train_documents": 2,
        "train_bytes": 10 + len(LONG),
        "val_documents": 0,
        "val_bytes": 0,
        "test_documents": 0,
        "test_bytes": 0,
    }
    assert result.repaired == {"a.txt": 1}
    assert train_texts(tmp_path) == ["café \ufffd\n", LONG.decode()]


def test_a_document_on_a_border_is_its_own_text_though_one_before_it_was_dropped(tmp_path: Path) -> None:
    files = {"a.txt": LONG, "b.txt": LONG, "c.txt": LONG.replace(b"number", b"letter")}
    run(tmp_path, files, exact_duplicates=True, val_fraction=0.25)
    val = "".join(iter_texts(tmp_path / "clean" / "val.jsonl"))
    assert len(val) == len(LONG) // 2
    assert "".join(train_texts(tmp_path)) + val == (files["a.txt"] + files["c.txt"]).decode()


def test_an_interrupted_run_leaves_nothing_to_one_with_other_params(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"a.txt": b"\x1b" + LONG})
    with pytest.raises(OSError):
        clean(params(), raw, Path("/proc/nowhere"), RUNTIME)
    assert [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    clean(params(control_characters=True), raw, tmp_path / "clean", RUNTIME)
    assert train_texts(tmp_path) == [LONG.decode()]


def test_the_same_raw_files_give_the_same_bytes(tmp_path: Path) -> None:
    files = {f"{i}.txt": LONG + str(i).encode() for i in range(20)}
    run(tmp_path, files, split="hash", val_fraction=0.2, test_fraction=0.2)
    first = {path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()}
    assert sorted(first) == ["test.jsonl", "train.jsonl", "val.jsonl"]
    run(tmp_path, files, split="hash", val_fraction=0.2, test_fraction=0.2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()} == first


def test_documents_that_are_held_out_too_are_named_as_a_cause() -> None:
    with pytest.raises(UserError, match="documents read: 9, 8 are also in val or test"):
        _check_result(params(), Counter(documents_in=9, leaked=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_bytes": 5000}, r"only 0 B of text left .*\(documents read: 1, clean\.min_bytes dropped 1"),
        (
            {"split": "hash", "val_fraction": 0.99},
            r"clean\.val_fraction .* clean\.split=auto for one long text",
        ),
        ({"split": "source"}, r"only 0 B of text left .* or set clean\.split=auto"),
    ],
)
def test_an_empty_result_names_its_cause_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, {"a.txt": LONG}, **changes)
    assert {path.name for path in tmp_path.iterdir()} - {"runs"} == {"raw"}


def test_what_the_next_stages_would_not_find_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"train.txt": LONG, "val.txt": b"val"})
    for split, message in {
        "test": r"evaluate\.split=test needs test documents, but there are none: set evaluate\.split to val, or",
        "val": None,
    }.items():
        if message:
            with pytest.raises(UserError, match=message):
                clean(params(split="source"), raw, tmp_path / "clean", RUNTIME, evaluated=split)
            assert not (tmp_path / "clean").exists()
        else:
            clean(params(split="source"), raw, tmp_path / "clean", RUNTIME, evaluated=split)
    with pytest.raises(UserError, match=r"train needs val documents, but there are none: set clean\.val_fraction"):
        clean(params(), make_raw(tmp_path, {"a.txt": LONG}), tmp_path / "clean", RUNTIME, evaluated="val")


def test_a_full_disk_is_reported_with_the_file_at_each_write(tmp_path: Path) -> None:
    raw = make_raw(tmp_path, {"x.txt": "\n".join(f"{i} {i * i}" for i in range(300)).encode()})  # small documents,
    rules = params(separator="\n", near_duplicates=0.8, split="tail", val_fraction=0.1)  # so arrays outgrow texts
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in range(0, 75_000, 3000):  # the signatures take 76.9 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                clean(rules, raw, tmp_path / "clean", RUNTIME)
            assert caught.value.errno and caught.value.strerror and caught.value.filename
            assert not (tmp_path / "clean").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    clean(rules, raw, tmp_path / "clean", RUNTIME)


def test_as_little_text_as_is_needed_is_enough(tmp_path: Path) -> None:
    run(tmp_path, {"a.txt": LONG[:LEAST_TRAIN_BYTES]})
    with pytest.raises(UserError, match="only 999 B of text left to train on, at least 1.0 kB needed"):
        run(tmp_path, {"a.txt": LONG[: LEAST_TRAIN_BYTES - 1]})


def test_a_separator_that_occurs_nowhere_is_reported_and_nothing_is_kept_for_another_try(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='clean.separator="---" is in none of the texts'):
        run(tmp_path, {"a.txt": LONG}, separator="---")
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


def test_duplicates_that_leave_almost_nothing_are_named(tmp_path: Path) -> None:
    files = {f"{i}.txt": LONG[: LEAST_TRAIN_BYTES // 2] for i in range(9)}
    with pytest.raises(
        UserError, match=r"only 500 B of text left .*\(documents read: 9, clean\.exact_duplicates dropped 8"
    ):
        run(tmp_path, files, exact_duplicates=True)
    with pytest.raises(UserError, match=r"documents read: 9, clean\.near_duplicates dropped 8"):
        run(tmp_path, files, near_duplicates=0.9)


def test_the_stage_says_what_it_dropped_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, SMALL | {"clean.min_bytes": 50})
    monkeypatch.chdir(project)
    documents = [f"{i}. {LONG.decode()[i : i + 200].strip()}" for i in range(40)]
    (project / "corpus.txt").write_text("\n\n".join([*documents, documents[0], documents[1], "too short"]))
    said = run_stages("download clean", project)
    assert said.splitlines()[1].startswith("clean: 43 documents (")
    assert said.splitlines()[2] == "clean: dropped 1 by clean.min_bytes, 2 by clean.exact_duplicates"


def test_a_text_of_white_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the text is empty, or only white space: set download.source"):
        run(tmp_path, {"a.txt": b"\n \n" * 5000})


def test_a_missing_raw_folder_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `dvc repro download`"):
        clean(params(), tmp_path / "raw", tmp_path / "clean", RUNTIME)


def test_a_line_of_text_is_what_json_would_write() -> None:
    text = 'a"\\\n\t\x00\x7f\u2028é😀</'
    assert text_line(text) == json.dumps({"text": text}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("damaged", [b"", bytes(5000), b"a text" * 500 + b"A text" * 500, None])
def test_a_raw_file_that_the_disk_has_damaged_is_refused(tmp_path: Path, damaged: bytes | None) -> None:
    raw = make_raw(tmp_path, {"a.txt": b"a text" * 1000, "b.txt": b"b text" * 1000})
    path = raw / "texts" / "b.txt"
    path.write_bytes(damaged) if damaged is not None else (path.unlink(), os.mkfifo(path))
    with pytest.raises(UserError, match=r"b\.txt is (damaged.*run `dvc repro -f -s download`|not a file)"):
        clean(params(), raw, tmp_path / "clean", RUNTIME)
