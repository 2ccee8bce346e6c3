"""Fuzzing with damaged files: damage one file of a sound project at random, and run a program that reads it.

    PYTHONPATH=. python tests/fuzz.py 50000              # this many files of all formats, as `make fuzz` does
    PYTHONPATH=. python tests/fuzz.py 500 tokens gguf    # only these formats
    PYTHONPATH=. python tests/fuzz.py tokens:17          # repeat one, and show the damage and the program's output

A program must accept the file, or refuse it in one line: no traceback, no abort, no control characters, at most 20 s of
CPU time and 1 GB of memory. A number such as 17 always stands for the same damage.

In a test: `assert failures("tokens", sound=done, n=100) == []`, with the fixture `done`. TINYGPT_FUZZ multiplies n.
"""

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
MOST_WALL_S = 120  # the machine may be busy
MOST_BYTES = 1_000_000_000  # more than the process had before
MOST_CHARS = 2000  # in a line of a message
MOST_LINES = 21  # in an error with several problems

Read = str | Callable[[], object]


class Format(NamedTuple):
    """Which files are damaged, and which programs read them."""

    damaged: tuple[str, ...]  # globs: one of these files is damaged
    read: tuple[Read, ...]  # one of these reads it: a stage, a command of `python -m tinygpt`, a function of a module
    sound: tuple[str, ...] = ()  # globs: other files that the programs read
    project: str = ""  # a folder in the sound project, if the files are in one


# a fifth as many files of these: their readers train, draw, or start Python
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
    "model": Format(
        ("data/model/*",), (GENERATE, "attention --prompt The", "promote"), ("params.yaml", "data/tokenizer/*")
    ),
    "hf": Format(
        ("data/export/hf/*",), (f"{GENERATE} --model data/export/hf", "import-hf data/export/hf"), ("params.yaml",)
    ),
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
EACH_ODD = 20  # one in this many files becomes a folder, link or pipe, which must be refused or left out
ODD: list[Callable[[Path], object]] = [
    Path.mkdir,
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/dev/zero"),
    os.mkfifo,
]
PIPED = ("prompts.jsonl", "prompts.txt")  # never a pipe: the reader would wait, as it does for <(…)
PACKERS = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """The content of a file with one to four damages, of kinds that fit its name."""
    packer = PACKERS.get(Path(name).suffix)
    if packer and rng.random() < 0.7:  # inside the packing, whose checksum would find any other damage
        return packer.compress(damaged(packer.decompress(data), Path(name).stem, rng))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(kinds(name))(data, rng)
    return resealed(data) if name.endswith(".tar") else data


def kinds(name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    """Ways to damage a file of this name; those made for its format are more frequent."""
    if name.endswith(".json"):
        return [flipped, cut, numbered, *[retyped] * 4]
    if name.endswith((".jsonl", ".yaml", ".csv", ".txt")):
        return [flipped, cut, *[numbered] * 2, *[reworded] * 2, *[retyped_line] * (3 if name.endswith("l") else 1)]
    if name.endswith(".safetensors"):
        return [flipped, cut, resized, *[reheaded] * 4]
    return [flipped, flipped, cut, *[resized] * 3, reworded]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Flip some bits, half of the time near the beginning, where headers are."""
    found, end = bytearray(data or b"\0"), rng.choice([len(data), min(len(data), 2000)])
    for _ in range(rng.choice([1, 1, 3, 30])):
        found[rng.randrange(max(1, end))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Remove the beginning, the middle, the end or all of it, or repeat a part."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:b] + data[a:], data[a:], b""])


def resized(data: bytes, rng: random.Random) -> bytes:
    """Change a number of 1 to 8 bytes, which may be a size or an offset."""
    width, end = rng.choice([1, 2, 4, 8]), rng.choice([len(data), min(len(data), 2000)])
    at = rng.randrange(max(1, end))
    number = rng.choice(SIZES) & ((1 << 8 * width) - 1)
    return data[:at] + number.to_bytes(width, rng.choice(["little", "little", "big"])) + data[at + width :]


def numbered(data: bytes, rng: random.Random) -> bytes:
    """Change a number written in digits."""
    found = list(re.finditer(rb"-?\d[\d.e+-]*", data))
    if not found:
        return flipped(data, rng)
    at = rng.choice(found)
    return data[: at.start()] + rng.choice(NUMBERS).encode() + data[at.end() :]


def reworded(data: bytes, rng: random.Random) -> bytes:
    """Replace a word by another of the file, by an odd text, or by bytes that are not UTF-8."""
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
    """Change a value of a JSON document: another type, too large, missing or deeply nested."""
    try:
        document = {"": json.loads(data)}
    except (ValueError, RecursionError):  # earlier damage broke it
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
    """The same in one of many lines."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], retyped(lines[i], rng), *lines[i + 1 :]])


def reheaded(data: bytes, rng: random.Random) -> bytes:
    """The same in the header of a safetensors file, whose size field is made to fit."""
    if len(data) < 8:
        return flipped(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    header = rng.choice([retyped, retyped, numbered])(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def resealed(data: bytes) -> bytes:
    """A tar file with right checksums in its headers, so that readers believe them."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[i] = block[:148] + b"%06o\0 " % (total & 0o777777) + block[156:]
    return b"".join(blocks)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) in a document, at most 200 of a list or object."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys[:200]:
        yield value, key
        yield from places(value[key])


# ---- a child process that reads many files ----


def failures(name: str, kind: Format | None = None, *, sound: Path, n: int = 100, first: int = 0) -> list[str]:
    """What went wrong with n damaged files (times TINYGPT_FUZZ): a line for each kind of failure, with an example.

    First each program reads the sound files, under numbers below 0. It must accept them, or it would test nothing.

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
    """Yield (number, what went wrong or None) from one process, until it dies."""
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
    """The name of the signal that killed a process."""
    return signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"


def last_frame(text: str) -> str:
    """The innermost line of our own code in a traceback."""
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
    faulthandler.register(signal.SIGPROF, faults, chain=True)  # prints the stack, then ends the process
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), "utf-8", write_through=True) for fd in (1, 2))
    for i in numbers:
        out.send(trial(name, kind, files, i, folder / "project", log))


def trial(name: str, kind: Format, files: dict[str, bytes], i: int, folder: Path, log: int) -> str | None:
    """Damage a file and let a program read it; returns what went wrong, or None."""
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
    """Write the files, one of them damaged, and go to their folder.  -> the reader, and the damaged file"""
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
    """-> (the program's last message, what is wrong with how it ended, whether it accepted the files)"""
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
    """What nobody should have to read in a message, such as a traceback; None if it is fine."""
    errors = [line for line in said.splitlines() if line.startswith(("error:", "       "))]
    messages = [line for line in said.split("\n") if re.match(r"\w+: |       ", line)]  # not prompts and answers
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
    """Reset the peak of this process's memory, and bound its memory.  -> the bytes that it has now"""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    limit = 1024 * int(re.search(r"VmSize:\s+(\d+)", status)[1]) + 8 * MOST_BYTES  # protects the machine
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return peak()


def peak() -> int:
    """The most bytes that this process has had since the reset."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- all formats ----


def make_sound(folder: Path) -> Path:
    """A project after all stages, with files of all formats that users bring."""
    make_project(folder)
    run_stages("code download clean base train_tokenizer encode train evaluate plot export", folder)
    return add_foreign(folder)


def add_foreign(folder: Path) -> Path:
    """Add texts, archives and prompts, and in `lora` a project that trains adapters for this one's model."""
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
    for path in (folder / "params.yaml", *folder.glob("presets/*.yaml")):  # comments go: damage there has no effect
        path.write_text(re.sub(r"(?m)^ *#.*\n|[ \t]+#.*$", "", path.read_text()))
    return folder


def main(arguments: list[str]) -> None:
    """See the top of this file."""
    n, names = next((int(a) for a in arguments if a.isdigit()), 1000), [a for a in arguments if not a.isdigit()]
    chosen = {name.partition(":")[0]: name.partition(":")[2] for name in names} or dict.fromkeys(FORMATS, "")
    sys.stdout.reconfigure(line_buffering=True)
    if os.access(MEMORY, os.W_OK):
        os.environ.setdefault("TMPDIR", MEMORY)  # syncing files costs nothing there
    weights = {name: 0.2 if name in SLOW else 1.0 for name in chosen}
    with tempfile.TemporaryDirectory(prefix="tinygpt-sound-") as folder:
        sound = made_before() or make_sound(Path(folder) / "project")
        for name, number in chosen.items():
            if number:
                show(name, int(number), sound)
                return
        workers()  # fork before there are threads

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
    """The sound project that TINYGPT_FUZZ_PROJECT names; keeping one saves the half minute it takes to make."""
    name = os.environ.get("TINYGPT_FUZZ_PROJECT")
    if name and not Path(name).exists():
        make_sound(Path(name))
    return Path(name) if name else None


def show(name: str, i: int, sound: Path) -> None:
    """Repeat one damage, in this process and in a folder that stays."""
    kind, folder = FORMATS[name], Path(tempfile.mkdtemp(prefix="tinygpt-damaged-"))
    files = read_files(sound, kind)
    read, chosen = lay_out(name, kind, files, i, folder)
    print(
        f"cd {folder}; python -m {read if str(read).startswith('stages.') else f'tinygpt {read}'}  # damaged: {chosen}"
    )
    print(*run_program(read))


if __name__ == "__main__":
    main(sys.argv[1:])
