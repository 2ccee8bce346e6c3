"""A trial of a GGUF file from anywhere: where one contradicts itself, llama.cpp aborts the process, and so has its own.

Nothing here imports PyTorch: it takes a fifth of a second, and as long as the file takes to be read.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tinygpt.errors import UserError, program
from tinygpt.export.llamacpp import LlamaCpp

MOST_SECONDS = 600  # to try a file out
TRIAL = "import sys; sys.path.insert(0, sys.argv[1]); from tinygpt.export.trial import try_out; try_out(*sys.argv[2:])"


def open_gguf(path: Path, *, n_ctx: int | None = None, n_threads: int = 1) -> LlamaCpp:
    """The file, after a trial.  Raises UserError with llama.cpp's reason where it cannot be used."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: name a .gguf file")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", TRIAL, root, str(path), str(n_ctx or "")]
    try:
        tried = subprocess.run(command, capture_output=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"llama.cpp does not get done with {path} in {MOST_SECONDS} s: it may be damaged") from None
    if tried.returncode:
        said = [*tried.stderr.decode(errors="replace").splitlines(), "no reason given"]
        if told := [line for line in said if line.startswith("error: ")]:
            raise UserError(told[0].removeprefix("error: "))
        reason = re.sub(r"^\S*/", "", said[0])  # without the path of the source file
        raise UserError(f"llama.cpp aborts at {path} ({reason}): it is damaged or contradicts itself, make it again")
    return LlamaCpp(path, n_ctx=n_ctx, n_threads=n_threads)


@program
def try_out(path: str, n_ctx: str) -> None:
    """Do with a file all that may abort."""
    with LlamaCpp(path, n_ctx=int(n_ctx) if n_ctx else None) as llama:
        llama.tokenize("A text, 1\n")
        llama.greedy([0], min(2, llama.n_ctx))
        for id in {*llama.eog_ids(), *range(llama.vocab_size)}:
            llama.piece(id)
