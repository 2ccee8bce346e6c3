"""Files: written whole or not at all, read with an error that says which stage makes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tinygpt.errors import UserError


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing (`"w"` UTF-8 text or `"wb"`); it appears under its name only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with open(partial, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is reported by write(), which knows no name
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `path` only when the block ends well."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # its own, should two programs write the same
    _remove_abandoned(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove what programs left half-written in place of `path` that were killed."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        try:
            os.kill(int(partial.suffixes[-2][1:]), 0)  # asks only whether it runs
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except (ValueError, OSError):
            continue


def checkout_of(root: Path = Path()) -> Path:
    """The checkout that a project's folder belongs to: DVC's temporary copies find theirs in DVC_ROOT."""
    return Path(os.environ.get("DVC_ROOT", root))


def runs_folder(root: Path = Path()) -> Path:
    """Where work is kept that was stopped half-way: `runs`, of which DVC knows nothing.

    DVC deletes outputs before it runs a stage. All kinds of runs of a checkout share the folder.
    """
    return checkout_of(root) / "runs"


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whose bytes depend on nothing but `value` (NaN and infinity are refused)."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path, *, stage: str) -> Any:
    """Read a JSON file that `stage` makes.  Raises UserError when it is missing or is no JSON."""
    try:
        return json.loads(must_exist(path, stage=stage).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON ({error}): run `dvc repro {stage}` to make it again") from None


def must_exist(path: str | Path, *, stage: str) -> Path:
    """Return `path`, or raise a UserError that names the stage which makes it."""
    path = Path(path)
    if not path.exists():
        place = "" if Path("params.yaml").exists() else " in the project's top folder"
        raise UserError(f"{path} not found: run `dvc repro {stage}`{place} to make it")
    return path


def human_bytes(n: int) -> str:
    """A size for people: 999 B, 1.5 kB, 2.1 MB (powers of 1000)."""
    size, units = float(n), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
