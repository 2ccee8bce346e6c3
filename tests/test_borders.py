"""Raw files in shards: shards have the documents of the whole files, and clean writes the same bytes."""

import dataclasses
import json
import mmap
import os
import pickle
import signal
from pathlib import Path

import pytest
from conftest import RUNTIME
from hypothesis import given
from hypothesis import strategies as st
from test_clean import ON, make_raw, params, words

from tinygpt import shards
from tinygpt.corpus import clean as clean_module
from tinygpt.corpus import folders
from tinygpt.corpus.clean import Report, clean
from tinygpt.corpus.documents import Reader, raw_shards
from tinygpt.corpus.folders import read_manifest, write_manifest
from tinygpt.corpus.sources import SOURCES
from tinygpt.errors import UserError
from tinygpt.files import sha256_file
from tinygpt.shards import Shard

WIKI_START = SOURCES["wikitext-2"].document_start
PIECES = [
    "a",
    "é",
    "\n",
    "\r\n",
    "\r",
    "--",
    "-",
    "𝄞",
    " ",
    " = T = \n",
    " = T = \r\n",
    "\n\n",
    " = = S = = \n",
    " = \n",
]


def documents(raw: Path, n_bytes: int, *, newlines: bool) -> tuple[list[str], int]:
    """Every text of a raw folder in shards of about n_bytes, and how many shards there were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "SHARD_BYTES", n_bytes)
        patch.setattr(folders, "MOST_SHARDS", 10**9)
        manifest = read_manifest(raw)
        reader = Reader(raw, manifest, separator=None, newlines=newlines)
        found = [shard for shard, _ in raw_shards(reader, manifest.files)]
        assert sum(shard.size for shard in found) == sum(file.bytes for file in manifest.files)
        return [text for shard in found for text in reader.iter_texts(shard)], len(found)


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=40),
    n_bytes=st.integers(1, 20),
    rule=st.sampled_from([{"separator": "--"}, {"separator": "\n\n"}, {"document_start": WIKI_START}, {}]),
    newlines=st.booleans(),
)
def test_where_files_are_cut_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], n_bytes: int, rule: dict[str, str], newlines: bool
) -> None:
    content = "".join(pieces).encode()
    raw = make_raw(tmp_path_factory.mktemp("raw"), {"a.txt": content, "b.txt": content, "c.txt": b"end"}, **rule)
    whole, n_whole = documents(raw, 10**9, newlines=newlines)
    assert documents(raw, n_bytes, newlines=newlines)[0] == whole
    assert n_whole == 1


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.jsonl", "".join(json.dumps({"text": f"é{i}"}) + "\n" for i in range(50)), {}),
        ("a.txt", "".join(f"text {i}\n<|endoftext|>\n" for i in range(50)), {"separator": "<|endoftext|>"}),
        ("a.txt", "".join(f"text {i}\r\n<|endoftext|>\r\n" for i in range(50)), {"separator": "<|endoftext|>"}),
        ("a.txt", "".join(f" = {i} = \n\n some text\n" for i in range(50)), {"document_start": WIKI_START}),
    ],
)
def test_a_large_file_is_cut(tmp_path: Path, name: str, content: str, rule: dict[str, str]) -> None:
    raw = make_raw(tmp_path, {name: content.encode()}, **rule)
    texts, n_shards = documents(raw, 100, newlines=True)
    assert len(texts) == 50
    assert 5 <= n_shards <= 20


@pytest.mark.parametrize("rule", [{"separator": "\n\n"}, {"document_start": WIKI_START}])
def test_what_is_before_a_border_is_not_read_again_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, str]
) -> None:
    read: list[object] = []

    class Watched(mmap.mmap):
        def __getitem__(self, part: object) -> object:
            read.append(part)
            return super().__getitem__(part)  # type: ignore[index]

    monkeypatch.setattr(mmap, "mmap", Watched)
    content = "\n\n" + "".join(f" = {i} = \n\n some text\n\n" for i in range(1000))
    documents(make_raw(tmp_path, {"a.txt": content.encode()}, **rule), 4000, newlines=True)
    assert len(read) <= 1


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw folder with duplicates of all kinds, in files of several shards."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(folders, "SHARD_BYTES", 3000)
    monkeypatch.setattr(shards, "WORTH_A_WORKER", 3000)
    texts = [" ".join(words(60, i % 70) + words(i % 9, i)) for i in range(120)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[40:])
    files = {"a.txt": "\n--\n".join(texts[:60]).encode(), "b.jsonl": lines.encode(), "c.txt": b"caf\xe9 \x00 " * 20}
    return make_raw(tmp_path, files, separator="--")


def run(raw: Path, **runtime: object) -> tuple[Report, dict[str, bytes]]:
    rules = {**ON, "near_duplicates": 0.7, "split": "hash", "val_fraction": 0.2}
    folder = raw.parent / "clean"
    report = clean(params(**rules), raw, folder, dataclasses.replace(RUNTIME, **runtime))
    return report, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_job_does_not_carry_the_list_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(work: object, *_: object, **__: object) -> None:
        raise UserError(f"{len(pickle.dumps(work))}")

    raw = make_raw(tmp_path, {f"{i}.txt": b"a" for i in range(300)})
    monkeypatch.setattr(clean_module, "shard_results", stop)
    with pytest.raises(UserError) as caught:
        run(raw)
    assert int(str(caught.value)) < 2000


def test_the_result_does_not_depend_on_the_workers(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(corpus, n_worker=1)
    counts = alone[0].counts
    assert all(counts[rule] for rule in ("exact_duplicates", "near_duplicates", "repaired_bytes", "control_removed"))
    assert run(corpus, n_worker=3) == alone
    monkeypatch.setattr(folders, "SHARD_BYTES", 10**9)
    assert run(corpus, n_worker=1) == alone


clean_shard = clean_module.clean_shard


def die_in_the_third(shard: Shard, path: Path, **rest: object) -> None:
    """clean_shard in a worker that is killed once."""
    mark = path.parents[2] / "killed"
    if path.name == "000003" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    clean_shard(shard, path, **rest)  # type: ignore[arg-type]


def test_ray_gives_the_same_bytes_though_a_worker_is_killed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    expected = run(corpus, n_worker=1)
    monkeypatch.setattr(clean_module, "clean_shard", die_in_the_third)
    assert run(corpus, engine="ray", n_worker=2) == expected
    assert (corpus.parent / "killed").exists()


def test_a_killed_worker_costs_its_shard_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(corpus, n_worker=1)
    monkeypatch.setattr(clean_module, "clean_shard", die_in_the_third)
    pid = os.fork()
    if pid == 0:  # so that the killed process is not this one
        run(corpus, n_worker=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (folder,) = (path for path in (corpus.parent / "runs").iterdir() if path.is_dir())
    done = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {"000000", "000001", "000002"} <= done.keys()
    monkeypatch.setattr(clean_module, "_choose", lambda *args: pytest.fail("stop before the results are cleared"))
    with pytest.raises(pytest.fail.Exception):
        run(corpus, n_worker=2)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in done.items() if "partial" not in name)
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(corpus.parent))
    assert run(corpus, n_worker=1) == expected


def test_a_mistake_in_the_text_is_reported_from_a_worker(corpus: Path) -> None:
    path = corpus / "texts" / "b.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:70], b"{}\n", *lines[71:]]))
    manifest = read_manifest(corpus)  # it has the file's digest
    files = (dataclasses.replace(file, sha256=sha256_file(corpus / "texts" / file.name)) for file in manifest.files)
    write_manifest(corpus, dataclasses.replace(manifest, files=tuple(files)))
    with pytest.raises(UserError, match=r'b\.jsonl line 71 is not a JSON object with a text named "text" .`{}`'):
        run(corpus, n_worker=2)
