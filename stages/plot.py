"""Draw the training curve.

Reads reports/train.csv and train_norms.csv, writes reports/plots.
"""

from pathlib import Path

from tinygpt.errors import program
from tinygpt.params import load_params
from tinygpt.report.config import PlotParams
from tinygpt.report.plots import read_curve, read_norms, write_plots

CURVE_FILE = Path("reports/train.csv")
NORMS_FILE = Path("reports/train_norms.csv")
PLOTS_DIR = Path("reports/plots")


@program
def main() -> None:
    """Run the stage."""
    curve = read_curve(CURVE_FILE)
    names = write_plots(curve, read_norms(NORMS_FILE), PLOTS_DIR, load_params(PlotParams))
    print(f"plot: {', '.join(names)} in {PLOTS_DIR}, from {len(curve):,} rows")


if __name__ == "__main__":
    main()
