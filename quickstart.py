"""A model from a text in one call, for notebooks and scripts: the pipeline's stages, run in this process.

    from quickstart import model_from_text
    model, tokenizer = model_from_text("my.txt", {"train.max_steps": 300}, folder="mine")

    python -m quickstart shakespeare          # presets/shakespeare.yaml, all stages, in the folder shakespeare/

Everything goes into its own project folder with its own params.yaml; your params.yaml and data/ are not touched.
"""

import argparse
import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt import paths
from tinygpt.cli.project import PRESETS, apply_values
from tinygpt.corpus.sources import SOURCES
from tinygpt.errors import UserError, program
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import load_model
from tinygpt.params import PARAMS_FILE, load_params, read_groups, require
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.train.config import TrainParams

ROOT = Path(__file__).parent
MARK = b"*\n"  # .gitignore of the folders made here: git must not take their data into the repository around them
TO_A_MODEL = ("download", "clean", "train_tokenizer", "encode", "train")
PATHS = ("download.source", "tokenizer.from_file")  # relative to the current folder
AFTER_IT = ("evaluate", "plot", "export", "report")


def model_from_text(
    source: str | Path, params: Mapping[str, Any] | None = None, *, folder: str | Path = "quickstart"
) -> tuple[GPT, Tokenizer]:
    """Train on a text and return the model, in eval mode, and its tokenizer.

    `source` is a file, a folder, or a name such as tinyshakespeare; `params` has values by "group.key". A second call
    with the same values loads the finished run. Raises the UserErrors of the stages.
    """
    project = new_project(folder, {**(params or {}), "download.source": str(source)})
    run_stages(project, *TO_A_MODEL)
    return load_model(project / paths.MODEL).eval(), load_tokenizer(project / paths.TOKENIZER)


def new_project(folder: str | Path, params: Mapping[str, Any]) -> Path:
    """Copy params.yaml into a folder, and change values there by "group.key".  Returns the folder.

    Raises UserError if it holds a project that was not made here.
    """
    runtime, train = load_params(RuntimeParams, TrainParams, path=ROOT / PARAMS_FILE)
    n, begin = params.get("runtime.n_process", runtime.n_process), params.get("train.init_from", train.init_from)
    require(
        (n == 1, f"runtime.n_process={n} must be 1, because quickstart trains in this process"),
        (begin == "scratch", "quickstart trains from scratch: for a base, use `preset base` and `dvc repro`"),
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        group, _, key = name.partition(".")
        is_file = name in PATHS and bool(value) and value not in SOURCES and Path(value).exists()
        groups.setdefault(group, {})[key] = str(Path(value).absolute()) if is_file else value
    project = Path(folder)
    project.mkdir(parents=True, exist_ok=True)
    mark = project / ".gitignore"
    theirs = [name for name in (mark.name, PARAMS_FILE.name, paths.RAW.parts[0]) if (project / name).exists()]
    if theirs and not (mark.exists() and mark.read_bytes() == MARK):
        raise UserError(f"quickstart did not make {project / theirs[0]}: move it away, or choose another folder")
    mark.write_bytes(MARK)
    shutil.copyfile(ROOT / PARAMS_FILE, project / PARAMS_FILE)
    apply_values(project / PARAMS_FILE, groups)
    return project


def run_stages(project: Path, *names: str) -> None:
    """Run stages one after the other."""
    for name in names:
        importlib.import_module(f"stages.{name}").run(project)


@program
def main() -> None:
    """Run all stages with a preset, from the text to the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="the name of a preset in presets/; the project folder gets the same name")
    name = parser.parse_args().preset
    if not (ROOT / PRESETS / f"{name}.yaml").exists():
        raise UserError(f"there is no preset {name}: `python -m tinygpt preset` lists them")
    groups = read_groups(ROOT / PRESETS / f"{name}.yaml")
    params = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    run_stages(new_project(name, params), *TO_A_MODEL, *AFTER_IT)


if __name__ == "__main__":
    main()
