"""Validation bits per byte of many small runs: by width, steps, text, size of the text, vocabulary and rates.

    python -m benchmarks.scaling --out FOLDER --text shakespeare=tinyshakespeare.txt --text german=FOLDER [...]

Each run goes through the stages from `download` to `train`, with params.yaml except for what its Trial changes. Each
text is a source, as `download.source` takes it; `python-docs` needs no file. Runs that are in the table are not
repeated, and stopped ones continue, so this can be stopped and started at will. Losses by steps do not depend on how
fast the machine is, or on what else it does.

The table, benchmarks/scaling.csv, has many runs on four texts: python-docs; tiny Shakespeare; code, the modules of
Python's standard library (3.11.7, without tests); german, the manual pages of Debian's manpages-de 4.18.1-1 without
comments and fonts. It has a few on eight more from Debian 12, to see how texts differ: dictionary and wordnet, bytes 3
to 13 million of gcide.dict and wn.dict in dict-gcide 0.48.5+nmu2 and dict-wn 3.0-37; linux, include/linux of
linux-headers-6.1.0-50-common; perl, the *.pod of perl-doc 5.36.0; elisp, the *.el of emacs-el 28.2; polish and
japanese, as german, from manpages-pl 4.18.1-1 and manpages-ja 0.5.0.0.20221215; french, the text of debian-reference-fr
2.100. It has as few on five more, which repeat themselves much: docbook, the *.xsl of docbook-xsl 1.79.2; vim, the
*.vim of vim-runtime 9.0.1378; cmake, the *.cmake of cmake-data 3.25.1; unicode, UnicodeData.txt of unicode-data 15.0.0;
iso, the *.json of iso-codes 4.15.0.

The first 106 rows are evaluated on the beginning of the validation text, all others on evenly spaced parts. `copied` of
the first 151 was measured later, on texts that were made again: linux of 6.1.0-57, french by another conversion. The
runs of linux and japanese with a width of 64 and 4,096 tokens are on such texts, too.
"""

import argparse
import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock

from quickstart import new_project
from tinygpt import paths
from tinygpt.corpus.folders import split_file
from tinygpt.errors import program
from tinygpt.files import read_json
from tinygpt.params import require
from tinygpt.plan.recipe import LAYERS
from tinygpt.plan.text import copied_share, sample_of
from tinygpt.tokens import SplitMeta, load_meta

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("scaling.csv")
HEAD_DIM = 32
EVAL_TOKENS = 50_000  # of validation text with 1,024 tokens; with another vocabulary, those of as many bytes


@dataclass(frozen=True)
class Trial:
    """One run: the text and what differs from params.yaml."""

    text: str
    max_steps: int
    n_embd: int = 128
    max_bytes: int = 10_000_000  # of the text
    vocab_size: int = 1024
    block_size: int = 128
    batch_size: int = 8
    lr_times: float = 1.0  # factor on the learning rates for the width
    dropout: float = 0.0
    weight_decay: float = 0.1

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join(str(value) for value in asdict(self).values())

    def params(self) -> dict[str, object]:
        """What to set in params.yaml."""
        scale = self.lr_times * math.sqrt(128 / self.n_embd)
        return {
            "model.n_layer": LAYERS[self.n_embd],
            "model.n_head": self.n_embd // HEAD_DIM,
            "model.n_embd": self.n_embd,
            "model.block_size": self.block_size,
            "model.dropout": self.dropout,
            "train.max_steps": self.max_steps,
            "train.batch_size": self.batch_size,
            "train.warmup_steps": min(20, self.max_steps // 10),
            "train.lr": 8e-3 * scale,
            "train.embedding_lr": 0.03 * scale,
            "train.weight_decay": self.weight_decay,
            "train.eval_every": self.max_steps // 8,
            "train.save_every": self.max_steps // 4,
            "train.sample_tokens": 0,
            "train.precision": "fp32",
        }


def grid(texts: list[str]) -> Iterator[Trial]:
    """Every run: many on each of the first four texts, a few on each further one."""
    yield from many(texts[:4])
    for text in texts[4:]:
        yield from (Trial(text, steps, n_embd=width) for steps, width in ((200, 64), (800, 128), (400, 128), (800, 64)))
        yield from (Trial(text, 400, vocab_size=4096), Trial(text, 800, n_embd=64, vocab_size=4096))


def many(texts: list[str]) -> Iterator[Trial]:
    """The most informative first: widths and steps, then small texts, vocabularies, rates, batches."""
    for steps, widths in ((400, (64, 96, 128)), (200, (128, 192)), (800, (64,)), (800, (128,)), (1600, (64,))):
        yield from (Trial(text, steps, n_embd=width) for width in widths for text in texts)
    two = texts[1:3]
    yield from (Trial(texts[0], 1600, dropout=dropout) for dropout in (0.1, 0.0))
    yield from (Trial(text, 400, vocab_size=size) for text in texts[:2] for size in (2048, 4096, 512))
    yield from (Trial(text, 200, n_embd=64) for text in texts)
    for text in two:
        yield from (Trial(text, 400, batch_size=16), Trial(text, 400, block_size=256))
    for text in texts:  # a small text, seen again and again, and what helps there
        again = Trial(text, 1600, n_embd=64, max_bytes=200_000)
        yield from (replace(again, dropout=dropout) for dropout in (0.2, 0.0))
        few, more = Trial(text, 400, max_bytes=200_000), Trial(text, 800, max_bytes=200_000)
        if text == texts[0]:
            yield from (replace(again, weight_decay=0.4), few, replace(few, dropout=0.2))
        if text in two:
            yield from (replace(again, dropout=dropout) for dropout in (0.1, 0.35))
            yield from (replace(trial, dropout=dropout) for trial in (few, more) for dropout in (0.2, 0.0))
            yield replace(few, dropout=0.1)
        some = Trial(text, 1600, n_embd=96, max_bytes=700_000, dropout=0.1)
        yield from (some, replace(some, dropout=0.2)) if text in two else (some,)
    yield from (Trial(texts[1], 1600, dropout=dropout) for dropout in (0.1, 0.0))
    rates = (0.6, 1.6)
    yield from (Trial(text, 400, lr_times=times) for text in two for times in rates)
    yield from (Trial(text, 200, n_embd=192, lr_times=times) for text in two for times in rates)
    yield from (Trial(text, 1600) for text in (texts[0], texts[3]))
    yield from (Trial(text, 400, n_embd=256) for text in two)
    yield from vocabularies(texts)


def vocabularies(texts: list[str]) -> Iterator[Trial]:
    """Runs with large vocabularies, on small texts and a large one, short and long."""
    small, large, sizes = texts[:2], texts[2], (4096, 8192)
    for size in sizes:
        yield from (Trial(text, 400, vocab_size=size) for text in (*small, large))
        yield from (Trial(text, 800, vocab_size=size) for text in small)
        yield from (Trial(text, 1600, n_embd=64, vocab_size=size, dropout=0.1) for text in small)
        yield Trial(texts[0], 800, n_embd=64, vocab_size=size)
    yield from (Trial(text, 800, vocab_size=4096, dropout=0.1) for text in small)
    yield Trial(large, 1600, n_embd=64, vocab_size=8192)
    yield from (Trial(texts[0], 1600, vocab_size=size) for size in (2048, 4096))
    yield Trial(texts[0], 1600, vocab_size=4096, dropout=0.1)
    yield from (Trial(texts[0], 400, n_embd=192, batch_size=16, vocab_size=size) for size in (1024, 4096))
    yield Trial(large, 1600, vocab_size=4096)


def prepare(text: str, max_bytes: int, vocab_size: int, source: str, out: Path) -> Path:
    """A folder with the text's tokens, which trials with the same text and vocabulary share."""
    folder = out / f"text-{text}-{max_bytes}-{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            changes = {"download.source": source, "download.max_bytes": max_bytes}
            new_project(folder, {**changes, "tokenizer.vocab_size": vocab_size, "runtime.n_worker": 1})
            run_program(folder, "download", "clean", "train_tokenizer", "encode")
            (folder / "done").touch()
    return folder


def train_in(folder: Path, tokens: Path, params: Mapping[str, object]) -> dict[str, Any]:
    """Train on the tokens of another folder.  -> the stage's report"""
    new_project(folder, {**params, "runtime.n_thread": 1})
    (folder / "data").mkdir(exist_ok=True)
    for name in ("tokens", "tokenizer"):
        (folder / "data" / name).unlink(missing_ok=True)  # it may be that of another vocabulary
        (folder / "data" / name).symlink_to(tokens / "data" / name)
    run_program(folder, "train")
    return read_json(folder / "reports/train.json", stage="train")


def run_program(folder: Path, *stages: str) -> None:
    """Run stages in a folder as a program, with one thread."""
    code = "import sys, pathlib, quickstart; quickstart.run_stages(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    environment = os.environ | {"DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "a") as log:
        command = [sys.executable, "-c", code, str(folder), *stages]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)


def bits(split: SplitMeta) -> float:
    """Bits per byte of one nat per token."""
    return split.tokens / split.bytes / math.log(2)


def measure(trial: Trial, source: str, out: Path) -> dict[str, object]:
    """Train, and return the row of the table."""
    tokens, usual = (prepare(trial.text, trial.max_bytes, size, source, out) for size in (trial.vocab_size, 1024))
    meta, usual_meta = (load_meta(folder / "data/tokens") for folder in (tokens, usual))
    eval_tokens = round(EVAL_TOKENS * bits(meta.val) / bits(usual_meta.val))
    report = train_in(out / trial.name, tokens, trial.params() | {"train.eval_tokens": eval_tokens})
    val, _ = sample_of(split_file(usual / paths.CLEAN, "val"))
    return asdict(trial) | {
        "n_params": report["n_params"],
        "vocab": meta.vocab_size,
        "train_bytes": meta.train.bytes,
        "train_tokens": meta.train.tokens,
        "copied": round(copied_share(val), 4),
        "tokens": report["tokens"],
        "epochs": round(report["epochs"], 3),
        "best_step": report["best_step"],
        "val_bpb": round(report["val_loss"] * bits(meta.val), 4),
        "last_val_bpb": round(report["last_val_loss"] * bits(meta.val), 4),
        "train_bpb": round(report["last_train_loss"] * bits(meta.train), 4),
        "seconds": round(report["seconds"], 1),
    }


@program
def main() -> None:
    """Run what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=SOURCE", help="a text, again for each")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    sources = {"python-docs": "python-docs"} | dict(text.split("=", 1) for text in arguments.text)
    require((len(sources) >= 4, f"the runs are of four texts or more: give {4 - len(sources)} more by --text"))
    rows = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    done = {tuple(row[key] for key in asdict(Trial("", 1))) for row in rows}
    trials = [each for each in dict.fromkeys(grid(list(sources))) if tuple(map(str, asdict(each).values())) not in done]
    print(f"{len(rows)} runs are in {TABLE.name}, {len(trials)} are left")
    lock = Lock()

    def run(trial: Trial) -> None:
        try:
            row = measure(trial, sources[trial.text], arguments.out.resolve())
        except subprocess.CalledProcessError:
            print(f"{trial.name} failed: see its log in {arguments.out}")
            return
        with lock:
            rows.append({key: str(value) for key, value in row.items()})
            with TABLE.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{len(rows)}: {trial.name} {row['val_bpb']} bits per byte at step {row['best_step']}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, trials))


if __name__ == "__main__":
    main()
