"""Put the run on one page.

Reads what the stages have written into reports, and params.yaml; writes reports/index.html.
"""

from pathlib import Path

from tinygpt.files import human_bytes
from tinygpt.paths import PAGE
from tinygpt.report.page import write_page
from tinygpt.stage import run_stage


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    write_page(root, root / PAGE)
    print(f"report: {PAGE}, {human_bytes((root / PAGE).stat().st_size)}: open it in a browser")


if __name__ == "__main__":
    run_stage(run)
