"""Write down what code each stage's results depend on: a change of it, but not of a comment, runs the stage again.

Reads the sources of stages and tinygpt, writes reports/code.json, which every other stage names under `params`.
"""

from pathlib import Path

from tinygpt.code import code_of
from tinygpt.files import write_json
from tinygpt.paths import CODE
from tinygpt.stage import run_stage


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path != Path(__file__))
    write_json(root / CODE, {name: code_of(f"stages.{name}") for name in names})


if __name__ == "__main__":
    run_stage(run)
