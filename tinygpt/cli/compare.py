"""`python -m tinygpt compare`: DVC's experiments side by side, as a table and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shutil import get_terminal_size

from tinygpt.errors import UserError
from tinygpt.params import load_params
from tinygpt.report.compare import MOST_CURVES, as_text, compare_table, find_experiments, plot_curves, read_curves
from tinygpt.report.config import PlotParams
from tinygpt.report.plots import NO_DATE


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "rev",
        nargs="*",
        help="an experiment, branch, tag, commit or `workspace`; without it the workspace, HEAD and its experiments",
    )
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves, too: a .png or .svg")


def run(args: argparse.Namespace) -> None:
    """Print the table, draw the curves."""
    if args.plot and args.plot.suffix[1:] not in NO_DATE:
        raise UserError(f"--plot {args.plot}: the name must end in .{' or .'.join(NO_DATE)}")
    experiments = find_experiments(args.rev)
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    print(as_text(compare_table(experiments), width))
    if not args.rev and all(one.is_baseline for one in experiments):
        print("no experiments of this commit yet: `dvc exp run -S train.lr=1e-3` makes one")
    if args.plot:
        curves = read_curves(experiments)
        if not curves:
            raise UserError("none of these has a reports/train.csv to draw: run `dvc repro train`")
        shown = dict(list(curves.items())[:MOST_CURVES])
        plot_curves(shown, args.plot, load_params(PlotParams))
        print(f"{args.plot} shows {len(shown)} of {len(curves)} curves")
