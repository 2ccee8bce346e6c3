"""Draw the training curve.

Reads reports/train.csv and train_norms.csv, writes reports/plots.
"""

from pathlib import Path

from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import PLOTS, REPORTS
from tinygpt.report.config import PlotParams
from tinygpt.report.plots import read_tables, write_plots
from tinygpt.stage import run_stage


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    tables = read_tables(root / REPORTS)
    names = write_plots(tables, root / PLOTS, load_params(PlotParams, path=root / PARAMS_FILE))
    print(f"plot: {', '.join(names)} in {PLOTS}, from {len(tables.curve):,} rows")


if __name__ == "__main__":
    run_stage(run)
