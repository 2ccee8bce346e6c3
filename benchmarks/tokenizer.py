"""Our tokenizer next to the tokenizers library, tiktoken and gigabpe: the same text, merges, ids and number of threads.

    python -m benchmarks.tokenizer                        # 64 MB of what this machine has installed
    python -m benchmarks.tokenizer --megabytes 1000 --folder /usr --only train

Each contender runs alone in a process of its own, in turn, `--repeat` times; the table has medians. gigabpe takes part
if it is installed (pip install gigabpe). The text consists of Python and C sources, documentation and type stubs from
the Python installation and from each `--folder`, shuffled, with no file twice. Times run from reading the text, from a
file for ours and gigabpe and from memory for the others, to the merges or to ids on disk.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.corpus.folders import cut_lines, iter_texts, text_line
from tinygpt.encode import save_ids, write_tokens
from tinygpt.errors import program
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import shard_results
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokenizer.bpe import learn_bpe
from tinygpt.tokenizer.json_format import to_bytes
from tinygpt.tokenizer.kinds import save_counts, sum_counts
from tinygpt.tokenizer.pretokenize import PATTERN
from tinygpt.tokenizer.tokenizer import EOS

SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".h", ".c"}
PROMPT = (
    "The quick brown fox jumps over the lazy dog; then def main(argv: list[str]) -> int: returns 0, it's done.\n" * 2
)


def gather(folder: Path, n_bytes: int, more: Sequence[Path]) -> int:
    """Write documents to text.jsonl and, one per line, to text.txt, until there are `n_bytes` of text -> its bytes.

    gigabpe takes each line as a document. So lines within a document end in "\\r" here, which pretokens treat alike.
    """
    roots = {*(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib", "include")), *more}
    sources = sorted({path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()})
    random.Random(0).shuffle(sources)
    known: set[bytes] = set()
    with open(folder / "text.jsonl", "w", encoding="utf-8") as out, open(folder / "text.txt", "wb") as lines:
        for source in sources:
            raw = source.read_bytes()
            try:
                text = raw.decode().replace("\n", "\r") + "\n"
            except UnicodeDecodeError:
                continue
            if (digest := hashlib.sha256(raw).digest()) not in known:
                known.add(digest)
                out.write(text_line(text))
                lines.write(text.encode())
                if lines.tell() >= n_bytes:
                    break
        return lines.tell()


def runtime(folder: Path, n_thread: int) -> RuntimeParams:
    """Settings for our own code; makes `folder` its scratch folder."""
    os.environ["DVC_ROOT"] = str(folder)
    return RuntimeParams(
        device="cpu",
        n_process=1,
        parallel="ddp",
        n_worker=n_thread,
        engine="process",
        ray_address=None,
        n_thread=n_thread,
        micro_batch_size=1,
        gradient_checkpointing=False,
        compile=False,
        cuda_graphs=False,
        log_every=1,
        log_to=(),
    )


def texts_of(folder: Path) -> list[str]:
    """All documents, in memory."""
    return [*iter_texts(folder / "text.jsonl")]


def train_ours(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """Count in worker processes, then merge; save the tokenizer that all others encode with."""

    def work() -> None:
        file, settings = folder / "text.jsonl", runtime(folder, n_thread)
        with shard_results(
            save_counts,
            cut_lines(file),
            name="count",
            key="",
            code="tinygpt.shards",
            runtime=settings,
        ) as paths:
            counts = sum_counts(paths)
        learn_bpe(counts, vocab_size).save(folder)

    return work


def train_tokenizers(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """The tokenizers library's own trainer; its merges must be ours."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    texts = texts_of(folder)

    def work() -> None:
        tokenizer.train_from_iterator(texts, trainer)

    def check() -> None:
        merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
        assert merges == load_tokenizer(folder).merges, "other merges than ours"

    work.check = check  # type: ignore[attr-defined]
    return work


def train_gigabpe(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """gigabpe, from a file; its alphabet has only the bytes that occur, so it makes a few more merges than we do."""
    import gigabpe

    merges: list[tuple[str, str]] = []

    def work() -> None:
        settings = {"special_tokens": [EOS], "pretokenizer": "bytelevel", "threads": n_thread}
        merges.extend(gigabpe.train_bpe([str(folder / "text.txt")], vocab_size, **settings)[1])

    def check() -> None:
        ours = load_tokenizer(folder).merges
        assert merges[: len(ours)] == ours, "other merges than ours"

    work.check = check  # type: ignore[attr-defined]
    return work


def encode_ours(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """As stages/encode.py does it, up to the token file."""
    tokenizer = load_tokenizer(folder)

    def work() -> None:
        file, settings = folder / "text.jsonl", runtime(folder, n_thread)
        work = partial(save_ids, tokenizer=folder)
        with shard_results(
            work, cut_lines(file), name="encode", key="", code="tinygpt.shards", runtime=settings
        ) as paths:
            write_tokens(folder / "ours.bin", (np.fromfile(path, tokenizer.dtype) for path in paths), tokenizer)

    return work


def write_others(folder: Path, encode: Callable[[list[str]], Iterator[list[int]]]) -> Callable[[], Any]:
    """Encode batches of documents into a file of ids, which must be ours."""
    texts, tokenizer = texts_of(folder), load_tokenizer(folder)

    def work() -> None:
        with open(folder / "others.bin", "wb") as file:
            for begin in range(0, len(texts), 1000):
                for ids in encode(texts[begin : begin + 1000]):
                    np.array([tokenizer.eos_id, *ids], tokenizer.dtype).tofile(file)
            np.array([tokenizer.eos_id], tokenizer.dtype).tofile(file)

    def check() -> None:
        assert (folder / "others.bin").read_bytes() == (folder / "ours.bin").read_bytes(), "other ids than ours"

    work.check = check  # type: ignore[attr-defined]
    return work


def encode_tokenizers(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """The tokenizers library's fastest way, which leaves out offsets."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a special token's name in a text is text, as with us
    return write_others(folder, lambda texts: (found.ids for found in tokenizer.encode_batch_fast(texts)))


def tiktoken_of(folder: Path) -> Any:
    """The same tokenizer in tiktoken, which takes a token's id as its rank."""
    import tiktoken

    tokenizer = load_tokenizer(folder)
    ranks = {to_bytes(t): i for i, t in enumerate(tokenizer.tokens) if i != tokenizer.eos_id}
    special = {EOS: tokenizer.eos_id}
    return tiktoken.Encoding("ours", pat_str=PATTERN.pattern, mergeable_ranks=ranks, special_tokens=special)


def encode_tiktoken(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """tiktoken on as many threads."""
    encoding = tiktoken_of(folder)
    return write_others(folder, lambda texts: encoding.encode_ordinary_batch(texts, num_threads=n_thread))


def prompt(encode: Callable[[str], Any]) -> Callable[[], Any]:
    """Encode the same prompt of about 200 bytes 10,000 times."""

    def work() -> None:
        for _ in range(10_000):
            encode(PROMPT)

    return work


def prompt_ours(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """Tokenizer.encode."""
    return prompt(load_tokenizer(folder).encode)


def prompt_tiktoken(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """Encoding.encode_ordinary."""
    return prompt(tiktoken_of(folder).encode_ordinary)


def prompt_tokenizers(folder: Path, n_thread: int, vocab_size: int) -> Callable[[], Any]:
    """Tokenizer.encode."""
    from tokenizers import Tokenizer

    return prompt(Tokenizer.from_file(str(folder / "tokenizer.json")).encode)


CONTENDERS = {
    "train": {"tinygpt": train_ours, "tokenizers": train_tokenizers, "gigabpe": train_gigabpe},
    "encode": {"tinygpt": encode_ours, "tokenizers": encode_tokenizers, "tiktoken": encode_tiktoken},
    "prompt": {"tinygpt": prompt_ours, "tokenizers": prompt_tokenizers, "tiktoken": prompt_tiktoken},
}


def measure(task: str, name: str, folder: Path, n_thread: int, vocab_size: int) -> None:
    """In a process of its own: do the work once and print seconds and peak memory."""
    work = CONTENDERS[task][name](folder, n_thread, vocab_size)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    # Our workers: the memory of the largest one, times their number.
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * n_thread
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + workers) * 1024
    getattr(work, "check", lambda: None)()
    print(json.dumps({"seconds": seconds, "peak": peak}))


@program
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="more text; can be repeated")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--measure", nargs=3, metavar=("TASK", "NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        task, name, folder = args.measure
        measure(task, name, Path(folder), args.threads, args.vocab_size)
        return
    print(
        f"{platform.machine()}, {args.threads} threads, "
        + ", ".join(f"{p} {version(p)}" for p in ("tokenizers", "tiktoken", "numpy"))
    )
    with tempfile.TemporaryDirectory() as folder:
        size = gather(Path(folder), args.megabytes * 1_000_000, args.folder)
        print(f"{size / 1e6:.0f} MB of text, vocabulary {args.vocab_size}\n")
        if "train" not in args.only:  # the others need its tokenizer
            train_ours(Path(folder), args.threads, args.vocab_size)()
        for task in args.only:
            compare(task, Path(folder), size, args)


def compare(task: str, folder: Path, size: int, args: argparse.Namespace) -> None:
    """Print one task's table."""
    names = [name for name in CONTENDERS[task] if importlib.util.find_spec(name)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.repeat):
        for name in found:
            command = [sys.executable, "-m", "benchmarks.tokenizer", "--measure", task, name, str(folder)]
            command += ["--threads", str(args.threads), "--vocab-size", str(args.vocab_size)]
            env = os.environ | {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    work = size if task != "prompt" else 10_000 * len(PROMPT.encode())
    base = statistics.median(run["seconds"] for run in found["tinygpt"])
    print(f"| {task} | seconds | MB/s | tinygpt is faster by | peak memory |\n|---|---|---|---|---|")
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs) / 1e6
        print(f"| {name} | {seconds:.2f} | {work / seconds / 1e6:.2f} | {seconds / base:.1f} | {peak:.0f} MB |")
    print()


if __name__ == "__main__":
    main()
