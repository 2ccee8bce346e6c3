"""`python -m tinygpt encode`, `decode`, `tokenizer-report`, `attention`: a text as the tokenizer and the model see it.

`encode` answers at once: what others import is imported where they need it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from tinygpt.cli.input import read_input
from tinygpt.errors import UserError, printable
from tinygpt.options import checked
from tinygpt.tokenizer import load_tokenizer

N_LONGEST = 12


def encode(args: Namespace) -> None:
    """Print ids, and pieces between bars: a space is a middle dot, a byte that is not a character its number."""
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(read_input() if args.text is None else checked(args.text))
    print(*ids)
    if not args.ids:
        print("".join(f"|{visible(tokenizer.decode_bytes([i]))}" for i in ids) + "|")
        print(f"{len(ids):,} tokens, {len(tokenizer.decode_bytes(ids)):,} bytes")


def decode(args: Namespace) -> None:
    """Print the text of ids, byte for byte."""
    words = [word for arg in args.ids or [read_input()] for word in arg.replace(",", " ").split()]
    if odd := [word for word in words if not word.isdecimal() or len(word) > 18]:
        raise UserError(f"{odd[0]!r} is not an id: give whole numbers, such as `decode 72 101`")
    try:
        raw = load_tokenizer(args.tokenizer).decode_bytes(map(int, words))
    except ValueError as error:
        raise UserError(str(error)) from None
    sys.stdout.buffer.write(raw)


def tokenizer_report(args: Namespace) -> None:
    """Print the table and the longest tokens, write the plot."""
    from tinygpt.corpus.folders import SPLITS, split_file
    from tinygpt.report.tokenizer import fit_file, fit_table, plot_fit
    from tinygpt.report.vocabulary import longest_tokens

    check_picture(args.plot)
    if args.against and not args.against.exists():
        raise UserError(f"--against {args.against} not found: give a tokenizer.json or the folder of one")
    paths = [args.tokenizer, *([args.against] if args.against else [])]
    tokenizers = {str(path): load_tokenizer(path) for path in paths}
    files = {split: split_file(args.text, split) for split in SPLITS}
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


def attention(args: Namespace) -> None:
    """Draw where each head of the model attends to, as a picture and a page."""
    from tinygpt.model.attention_maps import attention_maps
    from tinygpt.model.weights import load_pair
    from tinygpt.report.attention_maps import attention_page, plot_attention

    check_picture(args.plot)
    model, tokenizer = load_pair(args.model, args.tokenizer)
    ids = [*tokenizer.border_ids, *tokenizer.encode(checked(args.prompt))]
    if len(ids) > model.config.block_size:
        raise UserError(f"--prompt has {len(ids)} tokens, the model reads {model.config.block_size}: shorten it")
    tokens = [visible(tokenizer.decode_bytes([i])) for i in ids]
    maps = attention_maps(model, ids)
    plot_attention(maps, tokens, args.plot)
    page = args.plot.with_suffix(".html")
    attention_page(maps, tokens, page)
    print(f"{args.plot} has {maps.shape[0]} layers of {maps.shape[1]} heads, {page} shows one after the other")


def visible(raw: bytes) -> str:
    r"""Bytes as something to look at: b" a\n\xe4" -> "·a\\n\\xe4"."""
    return printable(raw.decode("utf-8", errors="backslashreplace").replace(" ", "·"))


def check_picture(path: Path) -> None:
    """Raises UserError where a plot has the name of another kind of file."""
    from tinygpt.report.plots import NO_DATE

    if path.suffix[1:] not in NO_DATE:
        raise UserError(f"--plot {path}: the name must end in .{' or .'.join(NO_DATE)}")
