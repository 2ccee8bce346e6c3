"""Files: written whole or not at all, read with an error that says which stage makes them."""

import ctypes
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tinygpt.errors import UserError

MOST_SYNCED = 1000  # files of a folder that are synced one by one: each takes milliseconds
ANEW = "copy it again, or run `dvc repro` if a stage made it"  # the remedy for a damaged file
MOST_JSON = 200_000_000  # bytes of a file: enough for a manifest of a million texts


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing (`"w"` UTF-8 text or `"wb"`); it appears under its name only when the block succeeds.

    The block may also replace the file that it gets, as safetensors does: the new one is synced to the disk, too, and
    gets the mode that the umask allows. Raises UserError where `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _new_partial(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    with naming(path, partial):
        try:
            with open(partial, mode, encoding=encoding, newline=newline) as file:
                allowed = os.fstat(file.fileno()).st_mode
                yield file
            partial.chmod(allowed)
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Name `path` in an error that names no file, as that of write() on a full disk, or only the partial file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (partial and str(error.filename) == str(partial)):
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces the folder `path` only when the block succeeds."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is not a folder: choose another path")
    path = path.resolve() if path.is_symlink() else path
    partial = _new_partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    with naming(path, partial):
        try:
            partial.mkdir(parents=True)
            yield partial
            written = [partial, *partial.rglob("*")]
            if len(written) > MOST_SYNCED:
                os.sync()  # of all disks; it reports no errors, and only Linux waits for its end
            else:
                for each in written:
                    _sync(each)
            if not (path.exists() and _exchange(partial, path)):
                shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # the old folder, or a half-written one


def _sync(path: Path) -> None:
    """Sync a file's bytes, or a folder's names, to the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError:
        if not path.is_dir():  # not every system can do it for a folder
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders, so that neither name is ever missing; False where the system cannot (other than Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <linux/fs.h>
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _new_partial(path: Path) -> Path:
    """This program's name for a half-written `path`, which others may write, too; removes what killed ones left."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(ValueError, OverflowError, OSError):  # a name without a number, or another user's file
            if not _is_running(int(partial.suffixes[-2][1:])):
                remove = shutil.rmtree if partial.is_dir() else Path.unlink
                remove(partial)
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # only asks
    except ProcessLookupError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder under another name: what is left of it when the program is killed would pass for whole."""
    left = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(folder.rename(left))


@contextmanager
def alone(lock: Path, work: str) -> Iterator[None]:
    """Hold the lock for the block; wait for a program that holds it, and say so."""
    from filelock import FileLock, Timeout  # here, because every command imports this file

    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        print(f"waiting for another program that does the same work ({work})", file=sys.stderr)
        held = FileLock(lock).acquire()
    with held:
        yield


def checkout_of(root: Path = Path()) -> Path:
    """The checkout that a project's folder belongs to: DVC's temporary copies find theirs in DVC_ROOT."""
    return Path(os.environ.get("DVC_ROOT", root))


def runs_folder(root: Path = Path()) -> Path:
    """Where all unfinished work of a checkout is kept: no output of DVC, which deletes outputs before each stage."""
    return checkout_of(root) / "runs"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces.  Raises UserError for a pipe or a device, as read_file does."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whose bytes depend on nothing but `value`.  Raises UserError for NaN and infinity."""
    try:
        with atomic_write(path) as file:
            json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
    except UnicodeError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} was not written ({error}): if the model's numbers overflow, lower train.lr and train again"
        ) from None


def read_json(path: str | Path, *, stage: str) -> dict[str, Any]:
    """Read a JSON object that `stage` makes.  Raises UserError when it is missing or is not one."""
    remedy = f"copy it again, or run `dvc repro {stage}` if that stage made it"
    return read_object(must_exist(path, stage=stage), remedy=remedy)


def read_object(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object from any file.  Raises UserError that ends with the remedy, whatever is wrong with it."""
    try:
        raw = read_file(Path(path))
        found = parse_json(raw)
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}, not an object")
        if b"\\u" in raw:
            json.dumps(found, ensure_ascii=False).encode()  # raises for half a character, which no file can hold
        return found
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}") from None


def read_file(path: Path, most_bytes: int = MOST_JSON) -> bytes:
    """All bytes of a file.  Raises ValueError when there are too many, or for a pipe or a device, which never end."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"it has {human_bytes(size)}, more than the limit of {human_bytes(most_bytes)}")
    return path.read_bytes()


def parse_json(raw: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON text in UTF-8.  Raises ValueError for anything else, and for what Python cannot hold.

    That includes numbers that are not finite or have thousands of digits, and lists nested too deeply.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode()
        return json.loads(text, **{"parse_constant": _finite, "parse_float": _finite} | hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `parse_json`: an object whose keys differ.  Raises ValueError that names a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'the key "{name[:100]}" occurs twice')
    return found


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def must_exist(path: str | Path, *, stage: str) -> Path:
    """Return `path`, or raise a UserError that names the stage that makes it."""
    path = Path(path)
    if not path.exists():
        place = "" if Path("params.yaml").exists() else " in the project's top folder"
        raise UserError(f"{path} not found: run `dvc repro {stage}`{place} to make it")
    if not (path.is_file() or path.is_dir()):  # reading a pipe would wait
        raise UserError(f"{path} is not a file: remove it and run `dvc repro {stage}`")
    return path


def unchanged(path: str | Path, sha256: str, *, stage: str) -> Path:
    """Return `path`.  Raises UserError if it is missing or has changed since its stage wrote it: DVC does not look."""
    if sha256_file(must_exist(path, stage=stage)) != sha256:
        raise UserError(f"{path} is damaged, its SHA-256 is not the recorded one: run `dvc repro -f -s {stage}`")
    return Path(path)


def some_of(problems: list[str], most: int) -> str:
    """The first problems, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")


def fenced(text: str) -> str:
    """A text as a code block of Markdown, whose fence is longer than any row of backticks in it."""
    fence = "`" * max([3, *(len(row) + 1 for row in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}\n"


def human_bytes(n: int) -> str:
    """A size for people: 999 B, 1.5 kB, 2.1 MB (powers of 1000)."""
    size, units = float(n), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
