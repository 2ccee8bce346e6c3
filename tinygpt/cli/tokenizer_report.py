"""`python -m tinygpt tokenizer-report`: how well a tokenizer fits the text, beside another one if asked."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.cli.encode import visible
from tinygpt.errors import UserError
from tinygpt.files import must_exist
from tinygpt.report.plots import NO_DATE
from tinygpt.report.tokenizer import fit_file, fit_table, longest_tokens, plot_fit
from tinygpt.tokenizer import load_tokenizer

SPLITS = ("train", "val", "test")
N_LONGEST = 12


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="folder (default: %(default)s)")
    command.add_argument("--against", type=Path, help="another tokenizer.json, such as GPT-2's, on the same text")
    command.add_argument("--text", type=Path, default=Path("data/clean"), help="folder (default: %(default)s)")
    command.add_argument("--plot", type=Path, default=Path("reports/tokenizer.png"), help="file (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the table and the longest tokens, write the plot."""
    if args.plot.suffix[1:] not in NO_DATE:
        raise UserError(f"--plot {args.plot}: the name must end in .{' or .'.join(NO_DATE)}")
    if args.against and not args.against.exists():
        raise UserError(f"--against {args.against} not found: give a tokenizer.json or the folder of one")
    paths = [args.tokenizer, *([args.against] if args.against else [])]
    tokenizers = {str(path): load_tokenizer(path) for path in paths}
    files = {split: must_exist(args.text / f"{split}.jsonl", stage="clean") for split in SPLITS}
    fits = {
        (name, split): fit_file(tokenizer, file)
        for name, tokenizer in tokenizers.items()
        for split, file in files.items()
    }
    table = fit_table(fits)
    if table.empty:
        raise UserError(f"{args.text} holds no text: run `dvc repro clean`")
    print(table.to_string(index=False))
    for name, tokenizer in tokenizers.items():
        print(f"\nlongest of {name}: " + "  ".join(visible(raw) for raw in longest_tokens(tokenizer, N_LONGEST)))
    plot_fit({name: (tokenizer, fits[name, "train"]) for name, tokenizer in tokenizers.items()}, args.plot)
    print(f"\n{args.plot} shows how often and how long tokens are")
