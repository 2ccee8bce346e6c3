"""Damaged and hostile archives of text: they are read or refused in one line, with little time and memory."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from fuzz import MEMORY
from pyarrow import parquet as pq
from test_sources import fill

from tinygpt.corpus.archive import iter_members
from tinygpt.corpus.folders import text_line
from tinygpt.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [f"Document {i} is about the naïve file.\n" * 10 for i in range(8)]
TEXT = "".join(DOCUMENTS).encode()
LINES = "".join(map(text_line, DOCUMENTS)).encode()
MOST_CPU_S = 20
MOST_KB = 300_000  # for the whole process, libraries included


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, if there is one: nearly ten thousand files are synced and removed here."""
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**29
    with tempfile.TemporaryDirectory(dir=MEMORY if has_room else None) as folder:
        yield Path(folder)


def tarred(members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=kind) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


def table(column: pa.Array | list[str], **options: object) -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": column, "id": list(range(len(column)))}), packed, **options)
    return packed.getvalue()


MEMBERS = [(f"{'long' * (1 + 40 * (i % 2))}/{i}é.txt", document.encode()) for i, document in enumerate(DOCUMENTS)]
SOUND = {
    "x.txt": TEXT,
    "x.jsonl": LINES,
    "x.json": LINES,
    "x.txt.gz": gzip.compress(TEXT),
    "x.jsonl.bz2": bz2.compress(LINES),
    "x.txt.xz": lzma.compress(TEXT),
    "x.txt.zst": zstandard.compress(TEXT),
    "gnu.tar": tarred(MEMBERS),
    "pax.tar": tarred(MEMBERS, tarfile.PAX_FORMAT),
    "x.tar.gz": gzip.compress(tarred(MEMBERS)),
    "x.tar.xz": lzma.compress(tarred(MEMBERS, tarfile.PAX_FORMAT)),
    "x.tar.zst": zstandard.compress(tarred(MEMBERS)),
    "x.zip": zipped(MEMBERS),
    "stored.zip": zipped(MEMBERS, zipfile.ZIP_STORED),
    "x.parquet": table(DOCUMENTS, compression="none"),
}
SIZES = [0, 1, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut out or repeat a part, or change a number."""
    found, end = bytearray(content), rng.choice([len(content), min(len(content), 1500)])
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, other = rng.randrange(end), rng.randrange(len(content))
        width = rng.choice([1, 2, 4, 8])
        match rng.randrange(4):
            case 0:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                size = rng.choice(SIZES) % (1 << 8 * width)
                found[at : at + width] = size.to_bytes(width, rng.choice(["little", "big"]))
            case 2:
                found[min(at, other) : max(at, other)] = b""
            case _:
                found[at:at] = content[min(at, other) : max(at, other)]
        found = found or bytearray(b"\0")
    return bytes(found)


def resealed(content: bytes) -> bytes:
    """A tar file with right checksums in its headers, so that readers believe them."""
    blocks = [bytearray(content[i : i + 512]) for i in range(0, len(content), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return b"".join(blocks)


@pytest.mark.parametrize("name", SOUND)
def test_a_damaged_file_is_taken_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    packers = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}
    packer = packers.get(Path(name).suffix)
    for seed in range(150):
        rng = random.Random(f"{name} {seed}")
        if packer and rng.random() < 0.7:  # inside the packing, where no checksum finds it
            inner = damaged(packer.decompress(SOUND[name]), rng)
            content = packer.compress(resealed(inner) if ".tar" in name else inner)
        else:
            content = damaged(SOUND[name], rng)
        (tmp_path / name).write_bytes(resealed(content) if name.endswith(".tar") else content)
        started = time.process_time()
        try:
            fill(tmp_path, name, max_bytes=rng.choice([None, 1000]))
        except UserError as error:
            assert len(str(error)) < 1000 and str(error).isprintable(), seed
        assert time.process_time() - started < MOST_CPU_S, seed


def test_a_tar_that_ends_between_two_members_or_lacks_one_is_damaged(tmp_path: Path) -> None:
    whole = tarred([("a.txt", b"a" * 512), ("b.txt", b"b" * 512)])
    for content in (whole[:2048], whole[:1024] + b"\1" + whole[1025:], whole[:1024]):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"x.tar is damaged or cut off \((no end mark|bad checksum)"):
            fill(tmp_path, "x.tar")


def header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that once took gigabytes, or minutes."""
    spaces, row = b" " * 22_000_000, "x" * 1_000_000
    names = [f"{'n' * 900_000}{i}" for i in range(25)]
    yield "names.tar.gz", gzip.compress(tarred([(name, b"text\n") for name in names]), 1)
    yield "hidden.tar.gz", gzip.compress(tarred([(f".{name}", b"text\n") for name in names]), 1)
    yield "pax.tar.gz", gzip.compress(tarred([("n" * 3_000_000, b"text\n")], tarfile.PAX_FORMAT))
    yield "skipped.tar.gz", gzip.compress(tarred([("x.bin", bytes(22_000_000))]), 1)
    yield "chain.tar", (header("x", 10, b"L") + bytes(512)) * 5000
    block = header("a.txt", 0, b"0")
    yield "backwards.tar", resealed(block[:124] + b"\xff" * 12 + block[136:])
    yield "x.txt.bz2", bz2.compress(spaces, 1)
    yield "x.txt.zst", zstandard.compress(spaces)
    dictionary = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1_500_000_000}
    yield "dictionary.txt.xz", lzma.compress(b"text\n", filters=[dictionary])
    yield "x.zip", zipped([("a.txt", spaces)])
    yield "bz2.zip", zipped([("a.txt", spaces)], zipfile.ZIP_BZIP2)
    yield "lzma.zip", zipped([("a.txt", spaces[:1000])], zipfile.ZIP_LZMA)
    yield "dictionary.parquet", table([row] * 150)
    yield "page.parquet", table([row] * 30, use_dictionary=False, compression="zstd")
    encoding = {"text": "DELTA_BYTE_ARRAY", "id": "PLAIN"}
    prefixes = [row + str(i) for i in range(30)]
    yield "prefix.parquet", table(prefixes, use_dictionary=False, compression="zstd", column_encoding=encoding)
    yield "deep.jsonl", b'{"text": "a"}\n{"text": "b", "c": ' + b"[" * 1_000_000 + b"\n"
    yield "line.jsonl", b'{"text": "' + spaces + b'"}\n'


READ = """
import resource, sys, time
from pathlib import Path
from test_sources import fill
from tinygpt.corpus import archive
from tinygpt.errors import UserError
archive.SMALL_BYTES //= 5
for path in sorted(Path(sys.argv[1]).iterdir()):
    begun = time.process_time()
    try:
        fill(path.parent.parent, str(path), max_bytes=10_000 if path.suffix == ".jsonl" else None)
    except UserError as error:
        print(path.name, error)
    assert time.process_time() - begun < 20, path
status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0"
print(int(status.partition("VmHWM:")[2].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # in kB; the process's own rusage would start at the peak of its parent


def test_small_files_that_hold_gigabytes_are_refused_within_a_budget(tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    for name, content in bombs():
        (tmp_path / "bombs" / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "bombs")],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DVC_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    *said, peaks = done.stdout.splitlines()
    assert not done.stderr
    assert max(map(int, peaks.split())) < MOST_KB, peaks
    assert [line.split()[0] for line in said] == sorted(os.listdir(tmp_path / "bombs"))
    assert all(len(line) < 500 for line in said)


@pytest.mark.parametrize(
    ("name", "most"),
    [("names.tar", 5_000_000), ("pax.tar", 5_000_000), ("header.tar", 5_000_000), ("x.txt.bz2", 60_000_000)],
)
def test_memory_does_not_grow_with_what_is_unpacked(tmp_path: Path, name: str, most: int) -> None:
    contents = {
        "names.tar": lambda: tarred([(f".{'n' * 100_000}{i}", b"text\n") for i in range(200)]),
        "pax.tar": lambda: tarred([(f".{'n' * 100_000}{i}", b"text\n") for i in range(200)], tarfile.PAX_FORMAT),
        "header.tar": lambda: tarred([("n" * 30_000_000, b"text\n")]),
        "x.txt.bz2": lambda: bz2.compress(b" " * 100_000_000, 1),
    }
    (tmp_path / name).write_bytes(contents[name]())
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            for _, chunks in iter_members(tmp_path / name):
                for _ in chunks:
                    pass
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# Parquet


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.string()]
)
def test_every_kind_of_strings_is_taken(tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "x.parquet").write_bytes(table(pa.array(["one", None, "zwölf", "one"]).cast(kind)))
    fill(tmp_path, "x.parquet")
    assert (tmp_path / "raw/texts/x.jsonl").read_text() == "".join(map(text_line, ["one", "zwölf", "one"]))


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    content = table(["one text\n" * 50, "caf# \n"], use_dictionary=False, compression="none")
    (tmp_path / "x.parquet").write_bytes(content.replace(b"caf#", b"caf\xe9"))
    fill(tmp_path, "x.parquet")
    assert b'{"text": "caf\xe9 \\n"}\n' in (tmp_path / "raw/texts/x.jsonl").read_bytes()


# Full disks


def test_a_full_disk_is_reported_with_the_file_at_each_write(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(SOUND["gnu.tar"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, 1000, 2000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                fill(tmp_path, "x.tar")
            assert caught.value.errno and caught.value.strerror and caught.value.filename
            assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
