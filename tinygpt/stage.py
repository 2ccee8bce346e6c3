"""A stage as a program, `python -m stages.<name>`: it takes no arguments, because params.yaml says what it does."""

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tinygpt.errors import UserError, printable, program
from tinygpt.files import human_bytes
from tinygpt.params import GROUPS, PARAMS_FILE, check_params, find_class, read_bytes, read_groups


@program
def run_stage(run: Callable[[Path], None]) -> None:
    """Run a stage in this folder, or print its help.  Exits with status 2 when given anything else."""
    module, arguments = sys.modules[run.__module__], sys.argv[1:]
    if not arguments:
        try:
            before = read_groups(PARAMS_FILE)
            check_memory(check_params())
        except UserError:
            if os.environ.get("RANK", "0") != "0":  # of the processes that `torchrun` starts, the first reports
                sys.exit(1)
            if "DVC_STAGE" in os.environ and PARAMS_FILE.exists():
                os.utime(PARAMS_FILE)  # `-S` may write a value in the second of git's last look, which misses it then
            raise
        run(Path())
        must_be_unchanged(before, groups_of(module) - {"runtime"})
    elif arguments in (["--help"], ["-h"]):
        print(f"{module.__doc__}\n{described(module)}")
    else:
        found, how = printable(arguments[0]), "set params with `dvc exp run -S group.key=value`, see --help"
        print(f"error: a stage takes no arguments, found {found}: {how}", file=sys.stderr)
        sys.exit(2)


def groups_of(module: ModuleType) -> set[str]:
    """The groups of params.yaml that a stage imports."""
    return {group for group in GROUPS if find_class(group) in vars(module).values()}


def must_be_unchanged(before: Mapping[str, Mapping[str, Any]], groups: Collection[str]) -> None:
    """Raise UserError if these groups have other values now: DVC would record those, which the stage did not use."""
    now = read_groups(PARAMS_FILE)
    keys = {(group, key) for group in groups for key in {*before[group], *now.get(group, {})}}
    changed = [f"{g}.{key}" for g, key in sorted(keys) if before[g].get(key, keys) != now.get(g, {}).get(key, keys)]
    if changed:
        raise UserError(
            f"{PARAMS_FILE} was edited while this stage ran ({', '.join(changed)}), and its results are those of the "
            "old values: run it again, or restore the old values first"
        )


def check_memory(groups: Mapping[str, Any]) -> None:
    """Raise UserError if even the weights, of four bytes each, and a step's ids, of eight, do not fit in memory."""
    model, train, tokenizer = groups["model"], groups["train"], groups["tokenizer"]
    learned = tokenizer.kind == "bpe" and tokenizer.from_file is None
    n_weights = model.n_weights(tokenizer.vocab_size if learned else 257)
    needed = 4 * n_weights + 8 * train.batch_size * (model.block_size + 1)
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise UserError(
            f"model: {n_weights:,} weights and the {train.batch_size:,} sequences of a step need at least "
            f"{human_bytes(needed)}, but this machine has {human_bytes(there)}: lower model.n_layer, model.n_embd, "
            "model.block_size, tokenizer.vocab_size or train.batch_size"
        )


def described(module: ModuleType) -> str:
    """The groups of params.yaml that a stage imports, line by line."""
    text = read_bytes(PARAMS_FILE).decode(errors="replace").replace("\r\n", "\n")
    groups = "|".join(groups_of(module))
    blocks = re.findall(rf"^(?:{groups}):.*\n(?:[ #].*\n|\n)*", text, re.MULTILINE)
    lines = [printable(line) for block in blocks for line in (*block.rstrip().split("\n"), "")]
    how = f"It takes no arguments: set keys in {PARAMS_FILE}, or use `dvc exp run -S group.key=value`."
    return "\n".join([how, *(["Its params, with their current values:", "", *lines] if lines else [])])
