"""Record the code that each stage's results depend on: if it changes, except for comments, the stage runs again.

Reads the sources of stages and tinygpt, writes reports/code.json, which every other stage names under `params`. It
always runs, so it also warns about experiments that DVC would lose silently.
"""

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinygpt.code import code_of
from tinygpt.errors import shown
from tinygpt.files import checkout_of, write_json
from tinygpt.params import PARAMS_FILE, check_params
from tinygpt.paths import CODE
from tinygpt.stage import run_stage


def run(root: Path) -> None:
    """Run the stage in the project's folder.  It runs before all others, so it checks the params of all."""
    check_params(root / PARAMS_FILE)
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path != Path(__file__))
    write_json(root / CODE, {name: code_of(f"stages.{name}") for name in names})
    checkout = checkout_of(root).resolve()
    for warning in lost_experiments(checkout, is_copy=checkout != root.resolve()):
        print(f"warning: {warning}", file=sys.stderr)


def lost_experiments(checkout: Path, *, is_copy: bool) -> list[str]:
    """Why DVC could not bring an experiment back from a copy to the checkout; `is_copy`: whether this is a copy."""
    found = []
    if not str(checkout).isascii() or unquote(urlsplit(f"file://{checkout}").path) != str(checkout):  # DVC makes a URL
        found.append(
            f"`dvc exp run --temp` and queues fail in the folder {shown(str(checkout))}: rename it to "
            "an ASCII name without # ? %, or run experiments without them"
        )
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if is_copy and subprocess.run(shallow, cwd=checkout, capture_output=True, check=False).stdout == b"true\n":
        found.append("DVC will not keep this experiment, as the clone is shallow: run `git fetch --unshallow` first")
    return found


if __name__ == "__main__":
    run_stage(run)
