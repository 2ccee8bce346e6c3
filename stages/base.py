"""Provide the model that training can start from: the one in dvc.lock, which must be the one in data/base.

`python -m tinygpt import-hf` and `promote` fill data/base and record it in dvc.lock. If there never was a base,
data/base contains only a README that says so.
"""

from pathlib import Path
from typing import Any

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
    """Run the stage in the project's folder.  Raises UserError for another base than the one in dvc.lock."""
    if not (root / BASE).exists():
        with atomic_folder(root / BASE) as folder:
            if not fetched(root, folder):
                (folder / "README.md").write_text(NO_BASE, encoding="utf-8")
    elif (root / ".dvc").is_dir() and is_another(root):
        raise UserError(
            f"{BASE} is not the base in dvc.lock: `dvc checkout -f {BASE}` restores that one, and `dvc commit -f base` "
            "records this one instead"
        )


def is_another(root: Path) -> bool:
    """Whether the files in data/base are not those of dvc.lock, if it names a base."""
    from dvc.repo import Repo

    with Repo(root) as repo:
        out = recorded(repo)
        return out is not None and bool(out.changed_checksum())


def recorded(repo: Any) -> Any:
    """DVC's output data/base; None if dvc.lock names no base."""
    (out,) = repo.find_outs_by_path(str(Path(repo.root_dir) / BASE))
    return out if out.hash_info and out.meta.nfiles != 1 else None  # 1: only the README


def fetched(root: Path, folder: Path) -> bool:
    """Fill the folder with the base in dvc.lock, from DVC's cache or remote; False if it names none."""
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    try:
        with Repo(root) as repo:
            if recorded(repo) is None:
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
