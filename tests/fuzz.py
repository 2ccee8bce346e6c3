"""Damaged files: a sound project, one of its files damaged at random, and a program that reads it.

    PYTHONPATH=. python tests/fuzz.py 50000              # so many files of all formats; `make fuzz` does this
    PYTHONPATH=. python tests/fuzz.py 500 tokens gguf    # of these formats
    PYTHONPATH=. python tests/fuzz.py tokens:17          # one again, with what was damaged and what the program says

A program must take the file, or refuse it in one line: no traceback, no abort, no character that steers a terminal, at
most 20 s of CPU time and 1 GB of memory. A number is a damage: it is the same every time.

In a test: `assert failures("tokens", sound=done, n=100) == []`, with the fixture `done`. TINYGPT_FUZZ multiplies n.
"""

from __future__ import annotations

import bz2
import contextlib
import faulthandler
import gzip
import importlib
import io
import json
import lzma
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from project import environment, make_project, run_stages, set_params, workers
from pyarrow import parquet

from tinygpt.cli.main import main as tinygpt
from tinygpt.corpus.folders import text_line
from tinygpt.errors import program
from tinygpt.stage import run_stage
from tinygpt.threads import n_cpu

FACTOR = float(os.environ.get("TINYGPT_FUZZ", "1"))
MEMORY = "/dev/shm"  # a disk in memory, on Linux
MOST_CPU_S = 20
MOST_WALL_S = 120  # on a machine that does other things, too
MOST_BYTES = 1_000_000_000  # above what the process had before
MOST_CHARS = 2000  # of a line that is to be read
MOST_LINES = 21  # of an error, where there are several problems

Read = str | Callable[[], object]


class Format(NamedTuple):
    """What is damaged, and who reads it."""

    damaged: tuple[str, ...]  # globs: one of these files is damaged
    read: tuple[Read, ...]  # one of them reads: a stage, a command of `python -m tinygpt`, a function of a module
    sound: tuple[str, ...] = ()  # globs: what the programs read as well
    project: str = ""  # the folder, of those next to each other, that all of it is in


# a fifth of the files: their readers train, draw, or start a Python
SLOW = ("base", "adapters", "checkpoints", "reports", "curves", "tokens", "parquet")
PAIR = ("data/model/*", "data/tokenizer/*")
DATA = ("params.yaml", "data/tokens/*", *PAIR)
REPORTED = ("data/raw/manifest.json", "reports/*.json")
WRITE = "generate --max-new-tokens 2 --device cpu"
GENERATE = f"{WRITE} --prompt The"
GGUF = "data/export/gguf/tinygpt-q8_0.gguf"

FORMATS = {
    "params": Format(("params.yaml",), ("profile --no-measure", "preset tiny"), ("presets/*", "data/tokenizer/*")),
    "presets": Format(("presets/tiny.yaml",), ("preset tiny", "preset"), ("params.yaml",)),
    "texts": Format(("texts/[!a]*",), ("stages.download",), ("params.yaml",)),
    "parquet": Format(("texts/a.parquet",), ("stages.download",), ("params.yaml",)),
    "raw": Format(("data/raw/**/*",), ("stages.clean",), ("params.yaml",)),
    "clean": Format(
        ("data/clean/*",), ("stages.train_tokenizer", "stages.encode"), ("params.yaml", "data/tokenizer/*")
    ),
    "tokenizer": Format(("data/tokenizer/*",), ("encode 'The naïve file'", "decode 54 300 7")),
    "tokens": Format(("data/tokens/*",), ("stages.evaluate",), DATA),
    "model": Format(("data/model/*",), (GENERATE, "attention --prompt The", "promote"), PAIR),
    "hf": Format(("data/export/hf/*",), (f"{GENERATE} --model data/export/hf", "import-hf data/export/hf")),
    "gguf": Format((GGUF,), (f"{GENERATE} --model {GGUF}",)),
    "checkpoints": Format(("runs/*/step-*/*", "runs/*/run.json"), ("runs", "runs --prune", "stages.train"), DATA),
    "curves": Format(("reports/*.csv",), ("stages.plot",), ("params.yaml",)),
    "reports": Format((*REPORTED, "data/model/training.json"), ("stages.export",), DATA),
    "base": Format(
        ("data/base/*",),
        ("preset base", f"{GENERATE} --model data/base", "stages.train"),
        (*DATA, "presets/*"),
        "lora",
    ),
    "adapters": Format(("data/model/*",), ("stages.export",), (*DATA, *REPORTED, "data/base/*"), "lora"),
    "prompts": Format(("prompts.jsonl",), (f"{WRITE} --prompts prompts.jsonl --format jsonl",), PAIR),
    "lines": Format(("prompts.txt",), (f"{WRITE} --prompts prompts.txt --format jsonl",), PAIR),
}


# ---- damage ----

NUMBERS = [
    *"-1 0 1 1.5 1e400 -1e308 1e-320 NaN Infinity 65536 10000000 2147483648 18446744073709551616".split(),
    "9" * 5000,
]
SIZES = [
    0,
    1,
    255,
    1 << 15,
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
TEXTS = [
    "",
    "\x00",
    "\x1b]0;title\x07",
    "\ud800",
    "é" * 3,
    "../../x",
    "/etc/passwd",
    "[" * 5000,
    "x" * 100_000,
    "<|a|>",
]
EACH_ODD = 20  # one of so many files becomes something else: all that is not a file is refused, or left out
ODD: list[Callable[[Path], object]] = [
    Path.mkdir,
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/dev/zero"),
    os.mkfifo,
]
PIPED = ("prompts.jsonl", "prompts.txt")  # a pipe is waited for, as the shell's <(…) is one
PACKERS = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """The content of a file, with one to four damages of the kinds that its name lets expect."""
    packer = PACKERS.get(Path(name).suffix)
    if packer and rng.random() < 0.7:  # within: outside, a checksum finds everything
        return packer.compress(damaged(packer.decompress(data), Path(name).stem, rng))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(kinds(name))(data, rng)
    return resealed(data) if name.endswith(".tar") else data


def kinds(name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    """Ways to damage a file of this name; what may be a file's own way more often than the others."""
    if name.endswith(".json"):
        return [flipped, cut, numbered, *[retyped] * 4]
    if name.endswith((".jsonl", ".yaml", ".csv", ".txt")):
        return [flipped, cut, *[numbered] * 2, *[reworded] * 2, *[retyped_line] * (3 if name.endswith("l") else 1)]
    if name.endswith(".safetensors"):
        return [flipped, cut, resized, *[reheaded] * 4]
    return [flipped, flipped, cut, *[resized] * 3, reworded]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Some bits turned, half of the time near the beginning, where headers are."""
    found, end = bytearray(data or b"\0"), rng.choice([len(data), min(len(data), 2000)])
    for _ in range(rng.choice([1, 1, 3, 30])):
        found[rng.randrange(max(1, end))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end, the middle or all of it is missing, or a part is there twice."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:b] + data[a:], data[a:], b""])


def resized(data: bytes, rng: random.Random) -> bytes:
    """A number of 1 to 8 bytes is another, as a size or an offset may be."""
    width, end = rng.choice([1, 2, 4, 8]), rng.choice([len(data), min(len(data), 2000)])
    at = rng.randrange(max(1, end))
    number = rng.choice(SIZES) & ((1 << 8 * width) - 1)
    return data[:at] + number.to_bytes(width, rng.choice(["little", "little", "big"])) + data[at + width :]


def numbered(data: bytes, rng: random.Random) -> bytes:
    """A number that is written out is another."""
    found = list(re.finditer(rb"-?\d[\d.e+-]*", data))
    if not found:
        return flipped(data, rng)
    at = rng.choice(found)
    return data[: at.start()] + rng.choice(NUMBERS).encode() + data[at.end() :]


def reworded(data: bytes, rng: random.Random) -> bytes:
    """A word is another one of the file, or an odd text, or bytes that are not UTF-8."""
    found = list(re.finditer(rb"[A-Za-z_.]{3,40}", data))
    if not found:
        return flipped(data, rng)
    at, other = rng.choice(found), rng.choice(found)
    odd = [
        rng.choice(TEXTS).encode(errors="surrogatepass"),
        b"\xff\xfe",
        b"*a",
        b"&a [*a, *a]",
        b"\t",
        b"null",
        b"{",
        b'"',
    ]
    return data[: at.start()] + rng.choice([other[0], rng.choice(odd)]) + data[at.end() :]


def retyped(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON document is of another type, too large, missing or deeply nested."""
    try:
        document = {"": json.loads(data)}
    except (ValueError, RecursionError):  # it has been damaged before
        return flipped(data, rng)
    holder, key = rng.choice(list(places(document)))
    depth = rng.choice([10, 100_000])
    odd = [
        None,
        True,
        [],
        {},
        [None],
        {"a": 1},
        1.5,
        -1,
        0,
        10**7,
        1 << 31,
        1 << 63,
        1 << 70,
        1e308,
        *TEXTS,
        float("nan"),
    ]
    odd += [holder[key], [holder[key]] * 2, {"x": holder[key]}, str(holder[key])[:100]]
    action = rng.random()
    if action < 0.15 and holder is not document:
        del holder[key]
    elif action < 0.25 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = rng.choice(odd)
    else:
        holder[key] = "deep" if action > 0.95 else rng.choice(odd)
    text = json.dumps(document.get("")).replace('"deep"', "[" * depth + "]" * depth, 1)
    return text.encode()


def retyped_line(data: bytes, rng: random.Random) -> bytes:
    """The same with a line of many."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], retyped(lines[i], rng), *lines[i + 1 :]])


def reheaded(data: bytes, rng: random.Random) -> bytes:
    """The same with the header of a safetensors file, whose size fits again."""
    if len(data) < 8:
        return flipped(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    header = rng.choice([retyped, retyped, numbered])(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def resealed(data: bytes) -> bytes:
    """A tar file whose headers have the right checksums, so that what stands in them is believed."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[i] = block[:148] + b"%06o\0 " % (total & 0o777777) + block[156:]
    return b"".join(blocks)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) in a document, no more than 200 of a list or object."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys[:200]:
        yield value, key
        yield from places(value[key])


# ---- a child that reads many ----


def failures(name: str, kind: Format | None = None, *, sound: Path, n: int = 100, first: int = 0) -> list[str]:
    """What went wrong with n damaged files (times TINYGPT_FUZZ): a line for each kind, with one of its numbers.

    First each program reads the sound files, under a number below 0: it must take them, or it tests nothing.

    `sound` is a folder with sound files, such as a project after all stages; it is only read. `kind` is a format that
    is not among FORMATS.
    """
    kind, last = kind or FORMATS[name], first + max(1, round(n * FACTOR))
    first = first or -len(kind.read)
    examples, counts = dict[str, int](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="tinygpt-fuzz-") as folder:
        files = read_files(sound, kind)
        while first < last:
            for i, fault in _child(name, kind, files, range(first, last), Path(folder)):
                first = i + 1
                if fault:
                    counts[fault] += 1
                    examples.setdefault(fault, i)
    return [f"{name}:{examples[fault]} and {counts[fault] - 1} more: {fault}" for fault, _ in counts.most_common()]


def read_files(sound: Path, kind: Format) -> dict[str, bytes]:
    """The files of a format, by their paths in the project."""
    sound, globs = sound / kind.project, dict.fromkeys((*kind.damaged, *kind.sound))
    return {str(p.relative_to(sound)): p.read_bytes() for g in globs for p in sorted(sound.glob(g)) if p.is_file()}


def _child(
    name: str, kind: Format, files: dict[str, bytes], numbers: range, folder: Path
) -> Iterator[tuple[int, str | None]]:
    """(number, what went wrong or None) from one process, as far as it lives."""
    here, there = Pipe(duplex=False)
    log = folder / "log"
    process = workers().Process(
        target=_work, args=(name, kind, files, numbers, folder, there, environment()), daemon=True
    )
    process.start()
    there.close()
    i = numbers.start
    try:
        for i in numbers:
            if not here.poll(MOST_WALL_S):
                process.kill()
                yield i, f"takes more than {MOST_WALL_S} s"
                return
            yield i, here.recv()
    except EOFError:
        process.join()
        died = "CPU time" if process.exitcode == -signal.SIGPROF else f"dies of {signal_name(process.exitcode)}"
        yield i, f"{died} {last_frame((folder / 'faults').read_text()) or log.read_text(errors='replace')[-300:]!r}"
    finally:
        process.kill()
        process.join()


def signal_name(status: int | None) -> str:
    """What killed a process."""
    return signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"


def last_frame(text: str) -> str:
    """The innermost place of our own code in a traceback."""
    found = re.findall(r'File "[^"]*/((?:tinygpt|stages)/[^"]*)", line (\d+),? in (\w+)', text)
    inner = found[0] if found and "most recent call first" in text else found[-1] if found else ("", "", "")
    return ":".join(inner).strip(":")


def _work(
    name: str, kind: Format, files: dict[str, bytes], numbers: range, folder: Path, out: Connection, env: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    faults = open(folder / "faults", "w")  # noqa: SIM115  # for as long as this process lives
    faulthandler.enable(faults)
    faulthandler.register(signal.SIGPROF, faults, chain=True)  # then it kills
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), "utf-8", write_through=True) for fd in (1, 2))
    for i in numbers:
        out.send(trial(name, kind, files, i, folder / "project", log))


def trial(name: str, kind: Format, files: dict[str, bytes], i: int, folder: Path, log: int) -> str | None:
    """Damage a file, read it: what is wrong with how that went, or None."""
    read, _ = lay_out(name, kind, files, i, folder)
    os.truncate(log, 0)
    had = reset_peak()
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    said, fault, taken = run_program(read)
    signal.setitimer(signal.ITIMER_PROF, 0)
    said += os.pread(log, 100_000, 0).decode(errors="replace")
    os.chdir("/")
    refused = f"{read} refuses sound files: {said[-300:]!r}" if i < 0 and not taken else None
    return fault or wrong_words(said) or too_much(peak() - had) or refused


def lay_out(name: str, kind: Format, files: dict[str, bytes], i: int, folder: Path) -> tuple[Read, str]:
    """Write the files, one of them damaged, and go there.  -> who is to read them, and which is damaged"""
    rng = random.Random(f"{name}:{i}")
    shutil.rmtree(folder, ignore_errors=True)
    chosen = rng.choice([path for path in files if any(fnmatch(path, pattern) for pattern in kind.damaged)])
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path != chosen or i < 0:
            (folder / path).write_bytes(data)
        elif i % EACH_ODD == EACH_ODD - 1:
            rng.choice(ODD[:-1] if path in PIPED else ODD)(folder / path)
        else:
            (folder / path).write_bytes(damaged(data, path, rng))
    os.chdir(folder)
    return (rng.choice(kind.read) if i >= 0 else kind.read[i]), chosen


def run_program(read: Read) -> tuple[str, str | None, bool]:
    """(its last words, what is wrong with how it ended, whether it took what it read)"""
    try:
        if callable(read):
            program(read)()
        elif read.startswith("stages."):
            sys.argv = [read]
            run_stage(importlib.import_module(read).run)
        else:
            sys.argv = ["tinygpt", *shlex.split(read)]
            tinygpt()
    except SystemExit as left:
        return f"{left.code}\n" if isinstance(left.code, str) else "", None, not left.code
    except BaseException as error:
        return "", f"{type(error).__name__} at {last_frame(traceback.format_exc())}", False
    return "", None, True


def wrong_words(said: str) -> str | None:
    """What a person should not have to read."""
    errors = [line for line in said.splitlines() if line.startswith(("error:", "       "))]
    messages = [line for line in said.split("\n") if re.match(r"\w+: |       ", line)]  # not a prompt and its answer
    rest = "".join(messages).replace("\r", "").replace("\t", "").replace("\x1b[K", "")
    if nowhere := re.search(r"\(\w+\.py:\d+\b", said):
        return f"names a place in the code {nowhere[0]} and no file"
    if "Traceback (most recent" in said:
        return f"prints a traceback at {last_frame(said)}"
    if odd := next((c for c in rest if not c.isprintable()), None):
        return f"prints {odd!r}"
    if len(errors) > MOST_LINES or any(len(line) > MOST_CHARS for line in messages):
        return f"prints a line too long or too many: {said[:60]!r}"
    return None


def too_much(n_bytes: int) -> str | None:
    """The same for memory."""
    return f"takes {n_bytes / 1e9:.0f} GB" if n_bytes > MOST_BYTES else None


def reset_peak() -> int:
    """Begin to measure the memory of this process anew, and bound it.  -> bytes that it has"""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    limit = 1024 * int(re.search(r"VmSize:\s+(\d+)", status)[1]) + 8 * MOST_BYTES  # so that the machine lives on
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return peak()


def peak() -> int:
    """The most bytes that this process had since then."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- all formats ----


def make_sound(folder: Path) -> Path:
    """A project after all stages, and files of all kinds that people bring."""
    make_project(folder)
    run_stages("code download clean base train_tokenizer encode train evaluate plot export", folder)
    return add_foreign(folder)


def add_foreign(folder: Path) -> Path:
    """Texts, archives and prompts, and in `lora` a project that trains adapters of this one's model."""
    lora, adapters = folder / "lora", {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    shutil.copytree(folder, lora, ignore=shutil.ignore_patterns(".git", ".dvc", "runs"))
    with contextlib.chdir(lora):
        assert run_program("promote")[0] == ""
    set_params(lora, {"train.init_from": "base", "train.lora": adapters, "train.max_steps": 10})
    run_stages("train evaluate", lora)
    lines = [
        f"A line of text, number {i}, with a naïve word in it, and some more to make it long enough." for i in range(40)
    ]
    text, documents = "\n".join(lines).encode(), "".join(map(text_line, lines)).encode()
    texts = folder / "texts"
    texts.mkdir()
    parquet.write_table(pa.table({"text": lines, "number": range(len(lines))}), texts / "a.parquet")
    for name, data in {
        "b.txt": text,
        "b.jsonl": documents,
        "c.txt.gz": gzip.compress(text),
        "d.jsonl.bz2": bz2.compress(documents),
        "e.txt.xz": lzma.compress(text),
    }.items():
        (texts / name).write_bytes(data)
    for name, mode in {"f.tar": "w", "g.tar.gz": "w:gz"}.items():
        with tarfile.open(texts / name, mode, format=tarfile.PAX_FORMAT) as archive:
            for member in ("é" * 60 + "/one.txt", "two.jsonl"):
                entry = tarfile.TarInfo(member)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
    with zipfile.ZipFile(texts / "h.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("in/one.txt", text)
        packed.writestr("two.jsonl", documents)
    try:
        from zstandard import ZstdCompressor
    except ImportError:
        pass
    else:
        (texts / "i.txt.zst").write_bytes(ZstdCompressor().compress(text))
    (folder / "prompts.jsonl").write_text('{"prompt": "The file"}\n{"prompt": "Return"}\n')
    (folder / "prompts.txt").write_text("The file\nReturn a new\n")
    set_params(folder, {"download.source": "texts"})
    for path in (folder / "params.yaml", *folder.glob("presets/*.yaml")):  # without comments, in which no damage tells
        path.write_text(re.sub(r"(?m)^ *#.*\n|[ \t]+#.*$", "", path.read_text()))
    return folder


def main(arguments: list[str]) -> None:
    """See the top of this file."""
    n, names = next((int(a) for a in arguments if a.isdigit()), 1000), [a for a in arguments if not a.isdigit()]
    chosen = {name.partition(":")[0]: name.partition(":")[2] for name in names} or dict.fromkeys(FORMATS, "")
    sys.stdout.reconfigure(line_buffering=True)
    if os.access(MEMORY, os.W_OK):
        os.environ.setdefault("TMPDIR", MEMORY)  # there is nothing to wait for when files are synced
    weights = {name: 0.2 if name in SLOW else 1.0 for name in chosen}
    with tempfile.TemporaryDirectory(prefix="tinygpt-sound-") as folder:
        sound = made_before() or make_sound(Path(folder) / "project")
        for name, number in chosen.items():
            if number:
                show(name, int(number), sound)
                return
        workers()  # before there are threads

        def fuzz(name: str) -> int:
            began, share = time.monotonic(), math.ceil(n * weights[name] / sum(weights.values()))
            found = failures(name, sound=sound, n=share)
            seconds = time.monotonic() - began
            print(
                "\n    ".join([f"{name}: {share:,} files in {seconds:.0f} s, {len(found)} kinds of failures", *found])
            )
            return len(found)

        with ThreadPoolExecutor(n_cpu()) as pool:
            bad = sum(pool.map(fuzz, chosen))
    sys.exit(1 if bad else 0)


def made_before() -> Path | None:
    """A sound project that TINYGPT_FUZZ_PROJECT names, to save the half minute that making one takes."""
    name = os.environ.get("TINYGPT_FUZZ_PROJECT")
    if name and not Path(name).exists():
        make_sound(Path(name))
    return Path(name) if name else None


def show(name: str, i: int, sound: Path) -> None:
    """One damage again, in this process and in a folder that stays."""
    kind, folder = FORMATS[name], Path(tempfile.mkdtemp(prefix="tinygpt-damaged-"))
    files = read_files(sound, kind)
    read, chosen = lay_out(name, kind, files, i, folder)
    print(
        f"cd {folder}; python -m {read if str(read).startswith('stages.') else f'tinygpt {read}'}  # damaged: {chosen}"
    )
    print(*run_program(read))


if __name__ == "__main__":
    main(sys.argv[1:])
