"""`python -m tinygpt attention`: draw where each head of the model looks in a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.cli.encode import visible
from tinygpt.cli.model import add_folder_options
from tinygpt.errors import UserError
from tinygpt.model.weights import load_pair
from tinygpt.report.attention_maps import attention_maps, attention_page, plot_attention
from tinygpt.report.plots import NO_DATE


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--prompt", required=True, help="the text to look at")
    add_folder_options(command)
    command.add_argument(
        "--plot",
        type=Path,
        default=Path("reports/attention.png"),
        help=".png or .svg; the page beside it ends in .html (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the picture and the page."""
    if args.plot.suffix[1:] not in NO_DATE:
        raise UserError(f"--plot {args.plot}: the name must end in .{' or .'.join(NO_DATE)}")
    model, tokenizer = load_pair(args.model, args.tokenizer)
    ids = [*tokenizer.border_ids, *tokenizer.encode(args.prompt)]
    if len(ids) > model.config.block_size:
        raise UserError(f"--prompt has {len(ids)} tokens, the model reads {model.config.block_size}: shorten it")
    tokens = [visible(tokenizer.decode_bytes([i])) for i in ids]
    maps = attention_maps(model, ids)
    plot_attention(maps, tokens, args.plot)
    page = args.plot.with_suffix(".html")
    attention_page(maps, tokens, page)
    print(f"{args.plot} has {maps.shape[0]} layers of {maps.shape[1]} heads, {page} shows one after the other")
