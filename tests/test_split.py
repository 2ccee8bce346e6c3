"""Splits are stable and disjoint, have the wanted sizes, and leave no test text in training."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from conftest import RUNTIME
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.corpus.clean import CleanParams, clean
from tinygpt.corpus.folders import SPLITS, Manifest, iter_texts, write_manifest
from tinygpt.corpus.raw import RawFolder
from tinygpt.corpus.split import (
    FACTS,
    NOWHERE,
    SPLITTERS,
    TEST,
    TRAIN,
    VAL,
    Cleaned,
    Shares,
    by_hash,
    check_held_out,
    choose_splitter,
    drop_leaks,
    little_held_out,
    place,
    save_cleaned,
    write_splits,
)
from tinygpt.errors import UserError
from tinygpt.params import from_mapping

HERE = Path(__file__).parent
ON = {
    "separator": None,
    "newlines": True,
    "control_characters": True,
    "unicode_nfc": True,
    "min_bytes": 1,
    "exact_duplicates": True,
    "near_duplicates": None,
    "split": "tail",
    "val_fraction": 0.0,
    "test_fraction": 0.0,
    "split_seed": 0,
}
LONG = "".join(f"{i} is a number.\n" for i in range(100)).encode()  # enough text for a train split
fractions = st.floats(0, 0.45)
texts_lists = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=20)


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep runs/ out of the checkout."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def make_raw(folder: Path, files: dict[str, bytes], separator: str | None = None) -> Path:
    """A raw folder as the download stage writes it; files `val.txt` and so on have that official split."""
    raw = RawFolder(folder / "raw", max_bytes=None)
    for name, content in files.items():
        split = Path(name).stem
        raw.add(name, iter([content]), split=split if split in SPLITS else None)
    found = {"source": "own", "licence": "unknown", "document_start": None, "python": None, "downloads": ()}
    write_manifest(raw.folder, Manifest(**found, separator=separator, files=tuple(raw.files)))
    return raw.folder


def split(
    folder: Path, texts: list[str], how: str, shares: Shares, official: list[int] | None = None, *, leaks: bool = False
) -> tuple[dict[str, list[str]], int]:
    """The texts of each split, and how many leaks there were."""
    save_cleaned(folder / "shard", texts, {}, seed=0, sign=False)
    cleaned = Cleaned([folder / "shard"])
    given_splits = np.array(official or [NOWHERE] * len(texts), np.int8)
    splits = SPLITTERS[how](cleaned.facts, given_splits, shares, cleaned.text)
    n_leaked = 0 if leaks else drop_leaks(splits, cleaned.facts)
    counts = write_splits(splits, cleaned.facts, cleaned.lines(), folder)
    found_texts = {name: list(iter_texts(folder / f"{name}.jsonl")) for name in SPLITS}
    for name, written in found_texts.items():
        sizes = [len(text.encode()) for text in written]
        assert (counts[f"{name}_documents"], counts[f"{name}_bytes"]) == (len(sizes), sum(sizes))
    return found_texts, n_leaked


def tail(texts: list[str], shares: Shares, folder: Path) -> dict[str, list[str]]:
    """The texts of each split, leaks included."""
    return split(folder, texts, "tail", shares, leaks=True)[0]


def hashed(texts: Iterable[str], shares: Shares, seed: int = 0) -> dict[str, str]:
    """text -> split"""
    texts = list(texts)
    facts = np.zeros(len(texts), FACTS)
    facts["place"] = [place(text, seed) for text in texts]
    assigned, _ = by_hash(facts, np.zeros(0, np.int8), shares, texts.__getitem__)
    return {text: SPLITS[i] for text, i in zip(texts, assigned, strict=True)}


def test_tail_cuts_one_text_by_characters(tmp_path: Path) -> None:
    assert tail(["0123456789"], Shares(0.2, 0.1), tmp_path) == {"train": ["0123456"], "val": ["78"], "test": ["9"]}


def test_tail_cuts_the_document_on_the_border(tmp_path: Path) -> None:
    found = tail(["abc", "defg", "hij"], Shares(0.5, 0.0), tmp_path)
    assert found == {"train": ["abc", "de"], "val": ["fg", "hij"], "test": []}


def test_tail_cuts_no_document_where_a_document_ends_at_the_border(tmp_path: Path) -> None:
    found = tail(["abcde", "fghij"], Shares(0.5, 0.0), tmp_path)
    assert found == {"train": ["abcde"], "val": ["fghij"], "test": []}


@given(texts=texts_lists, val=fractions, test=fractions)
def test_tail_loses_nothing_and_keeps_the_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], val: float, test: float
) -> None:
    found = tail(texts, Shares(val, test), tmp_path_factory.mktemp("tail"))
    whole = "".join(texts)
    train = "".join(found["train"])
    assert train + "".join(found["val"]) + "".join(found["test"]) == whole
    assert len(train) == int(len(whole) * (1 - val - test))


def real_or_made_shakespeare() -> str:
    """The real text if a mirror has it, otherwise a similar one, so that tests need no other files."""
    for folder in (os.environ.get("TINYGPT_MIRROR", ""), HERE.parent.parent / "shared" / "corpora"):
        path = Path(folder, "tinyshakespeare.txt")
        if path.is_file():
            return path.read_bytes().decode()
    return "".join(f"First Citizen:\nBefore we proceed {i}, hear me -- speak!\n\n" for i in range(20_000))


@pytest.mark.parametrize("made", [True, False])
def test_tiny_shakespeare_is_split_as_nanogpt_splits_it(tmp_path: Path, made: bool) -> None:
    data = "É\tto be&c.--\n\n\nor not:\n" * 5_001 if made else real_or_made_shakespeare()
    raw = make_raw(tmp_path, {"tinyshakespeare.txt": data.encode()})
    rules = {**ON, "near_duplicates": 0.8, "min_bytes": 100, "split": "tail", "val_fraction": 0.1}
    clean(from_mapping(CleanParams, rules), raw, tmp_path / "clean", RUNTIME)
    n = len(data)
    train, val = data[: int(n * 0.9)], data[int(n * 0.9) :]  # the usual recipe
    assert list(iter_texts(tmp_path / "clean" / "train.jsonl")) == [train]
    assert list(iter_texts(tmp_path / "clean" / "val.jsonl")) == [val]
    assert list(iter_texts(tmp_path / "clean" / "test.jsonl")) == []


@given(texts=texts_lists, more=texts_lists, val=fractions, test=fractions)
def test_hash_keeps_each_text_in_its_split_when_others_are_added(
    texts: list[str], more: list[str], val: float, test: float
) -> None:
    shares = Shares(val, test)
    alone, joined = hashed(texts, shares, 3), hashed([*more, *reversed(texts)], shares, 3)
    assert alone.items() <= joined.items()
    assert set(joined.values()) <= set(SPLITS)


def test_hash_meets_the_fractions() -> None:
    splits = list(hashed((f"document {i}" for i in range(20_000)), Shares(0.1, 0.05)).values())
    assert splits.count("val") / len(splits) == pytest.approx(0.1, abs=0.01)
    assert splits.count("test") / len(splits) == pytest.approx(0.05, abs=0.01)


def test_hash_moves_nothing_from_train_to_test_when_val_grows() -> None:
    texts = [f"document {i}" for i in range(2000)]
    small, large = hashed(texts, Shares(0.1, 0.1)), hashed(texts, Shares(0.3, 0.1))
    assert {text for text in texts if small[text] == "test"} == {text for text in texts if large[text] == "test"}


def test_another_seed_chooses_other_documents() -> None:
    texts = [f"document {i}" for i in range(200)]
    seeds = (0, 1, 2**32, 2**53 - 1)
    assert len({tuple(hashed(texts, Shares(0.5, 0.0), seed).values()) for seed in seeds}) == len(seeds)


def test_hash_is_the_same_on_every_machine() -> None:
    splits = hashed((f"document {i}" for i in range(1000)), Shares(0.2, 0.2), 7)
    assert hashlib.sha256(repr(splits).encode()).hexdigest()[:16] == "5d6343ea215fa766"


def test_source_keeps_the_official_splits(tmp_path: Path) -> None:
    found, _ = split(tmp_path, ["a", "b", "c"], "source", Shares(0, 0), [TEST, TRAIN, VAL])
    assert found == {"train": ["b"], "val": ["c"], "test": ["a"]}


def test_the_choices_of_the_params_are_the_splitters() -> None:
    assert {"auto", *SPLITTERS} == set(get_args(get_type_hints(CleanParams)["split"]))


# The choice between them


@pytest.mark.parametrize(
    ("n_documents", "shares", "chosen"),
    [
        (1, Shares(0.05, 0.05), "tail"),  # one long text
        (7, Shares(0.1, 0.0), "tail"),  # one in pieces of sixteen million characters
        (60, Shares(0.05, 0.05), "tail"),
        (500, Shares(0.05, 0.05), "hash"),
        (60, Shares(0.2, 0.0), "hash"),
        (40, Shares(0.1, 0.0), "tail"),  # four documents for val
        (41, Shares(0.1, 0.0), "hash"),  # five documents for val
        (1, Shares(0.0, 0.0), "hash"),
    ],
)
def test_auto_cuts_what_has_too_few_documents_for_val_and_test(
    tmp_path: Path, n_documents: int, shares: Shares, chosen: str
) -> None:
    texts = (f"document {i}" for i in range(n_documents))
    save_cleaned(tmp_path / "x", texts, {}, seed=0, sign=False)
    facts = Cleaned([tmp_path / "x"]).facts
    assert choose_splitter("auto", facts, shares) == chosen
    assert all(choose_splitter(how, facts, shares) == how for how in SPLITTERS)


def test_one_file_is_split_by_position_by_default_and_clean_says_so(tmp_path: Path) -> None:
    rules = {**ON, "split": "auto", "val_fraction": 0.05, "test_fraction": 0.05}
    result = clean(from_mapping(CleanParams, rules), make_raw(tmp_path, {"a.txt": LONG}), tmp_path / "clean", RUNTIME)
    assert result.split == "tail"
    assert (
        "".join(text for name in SPLITS for text in iter_texts(tmp_path / "clean" / f"{name}.jsonl")) == LONG.decode()
    )
    (told, _) = little_held_out(result.counts, "tail")
    assert re.fullmatch(r"val has [0-9]+ B \(documents: 1\)", told)


def test_little_held_out_text_is_reported() -> None:
    many = {"val_documents": 5, "val_bytes": 10**6, "test_documents": 4, "test_bytes": 10**6}
    assert little_held_out(many, "hash") == ["test has 1.0 MB (documents: 4)"]
    assert little_held_out(many, "tail") == []
    assert little_held_out({**many, "test_documents": 0, "test_bytes": 0}, "hash") == []


@pytest.mark.parametrize(
    ("val", "test", "asked", "message"),
    [
        (0, 5, "test", "train needs val documents, but there are none: set clean.val_fraction above 0"),
        (0, 5, "val", "train needs val documents, but there are none: set clean.val_fraction above 0"),
        (
            5,
            0,
            "test",
            "evaluate.split=test needs test documents, but there are none: set evaluate.split to val, or set",
        ),
    ],
)
def test_another_evaluate_split_is_advised_only_for_evaluation(val: int, test: int, asked: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_held_out({"val": val, "test": test}, asked)
    check_held_out({"val": 5, "test": 0}, "val")


# Leaks


def test_train_loses_what_is_in_val_or_test(tmp_path: Path) -> None:
    official = [TEST, VAL, TRAIN, TRAIN, TRAIN, TRAIN]
    found, n_leaked = split(tmp_path, ["x", "y", "x", "y", "z", "z"], "source", Shares(0, 0), official)
    assert found == {"train": ["z", "z"], "val": ["y"], "test": ["x"]}
    assert n_leaked == 2


@given(
    texts=st.lists(st.sampled_from(["a", "b", "ab", "aa", "ba"]), min_size=1, max_size=30),
    how=st.sampled_from(["hash", "tail"]),
    val=fractions,
    test=fractions,
)
def test_no_text_is_in_train_and_in_evaluation(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], how: str, val: float, test: float
) -> None:
    found, n_leaked = split(tmp_path_factory.mktemp("splits"), texts, how, Shares(val, test))
    assert not set(found["train"]) & {*found["val"], *found["test"]}
    n_found = sum(len(text) for texts_of_split in found.values() for text in texts_of_split)
    assert bool(n_leaked) == (n_found < sum(map(len, texts)))


def test_official_test_texts_stay_and_their_copies_leave_train(tmp_path: Path) -> None:
    files = {"train.txt": LONG + b"--copy--own", "val.txt": b"copy--own val", "test.txt": b"own test--own test"}
    raw = make_raw(tmp_path, files, separator="--")
    rules = {**ON, "split": "source", "exact_duplicates": False}
    report = clean(from_mapping(CleanParams, rules), raw, tmp_path / "clean", RUNTIME).counts
    assert list(iter_texts(tmp_path / "clean" / "train.jsonl")) == [LONG.decode().strip("\n"), "own"]
    assert list(iter_texts(tmp_path / "clean" / "val.jsonl")) == ["copy", "own val"]
    assert report["leaked"] == 1
    assert report["test_documents"] == 2
    report = clean(
        from_mapping(CleanParams, {**rules, "exact_duplicates": True}), raw, tmp_path / "clean", RUNTIME
    ).counts
    assert (report["exact_duplicates"], report["leaked"]) == (2, 0)
    assert list(iter_texts(tmp_path / "clean" / "val.jsonl")) == ["copy", "own val"]
