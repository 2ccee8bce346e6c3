"""Provide the model that training can start from: what is in data/base, or else what dvc.lock says was there.

`python -m tinygpt import-hf` and `promote` fill data/base and run this stage, so that DVC tracks it. If there never was
a base, data/base contains only a README that says so.
"""

from pathlib import Path

from tinygpt.errors import UserError
from tinygpt.files import atomic_folder
from tinygpt.paths import BASE
from tinygpt.stage import run_stage

NO_BASE = """\
# data/base

The model that training starts from with `train.init_from: base`: there is none yet. `python -m tinygpt import-hf
FOLDER` fills this folder from a folder of transformers, `python -m tinygpt promote` from `data/model`; then `python -m
tinygpt preset base` sets params.yaml to go on from it.
"""


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    if (root / BASE).exists():
        return
    with atomic_folder(root / BASE) as folder:
        if not fetched(root, folder):
            (folder / "README.md").write_text(NO_BASE, encoding="utf-8")


def fetched(root: Path, folder: Path) -> bool:
    """Fill the folder with the base in dvc.lock, from DVC's cache or remote; False if it names none."""
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    try:
        with Repo(root) as repo:
            (out,) = repo.find_outs_by_path(str((root / BASE).absolute()))
            if not out.hash_info or out.meta.nfiles == 1:  # only the README
                return False
            DVCFileSystem(repo).get(f"{BASE}/", str(folder), recursive=True)  # the slash: its contents
            return True
    except Exception as error:  # any kind: it may come from a remote's library
        raise UserError(
            f"{BASE} is missing, and DVC cannot fetch the one in dvc.lock ({error}): run `python -m tinygpt "
            f"import-hf FOLDER` or `promote` again, or `mkdir -p {BASE}` to continue without one"
        ) from None


if __name__ == "__main__":
    run_stage(run)
