"""Files at an address of any file system that fsspec knows (https://filesystem-spec.readthedocs.io): s3://, gs://, …"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

import fsspec

from tinygpt.errors import UserError
from tinygpt.progress import progress

CHUNK_BYTES = 1 << 20


def fetch_bucket(source: str, cache: Path) -> list[tuple[str, Path]]:
    """Copy the files of an address, a folder's or a glob's, into `cache`.  -> (name, path) of each, sorted by name

    A file that was copied before and has the same size and checksum there is not copied again. Raises UserError where
    the address names nothing, is refused, or needs a package that is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(source)
        found = files.glob(path) if fsspec.core.has_magic(path) else files.find(path)
        base = PurePosixPath(os.path.commonpath([str(PurePosixPath(name).parent) for name in found]) if found else "")
        copies = []
        for name in sorted(found):
            mark = hashlib.sha256(f"{source} {name} {files.ukey(name)}".encode()).hexdigest()[:16]
            copy = cache / f"{mark}-{PurePosixPath(name).name}"
            if not copy.exists():
                _copy(files, name, copy)
            copies.append((str(PurePosixPath(name).relative_to(base)), copy))
    except (ImportError, ValueError) as error:  # no such protocol, or a package that is missing for it
        raise UserError(f"download.source={source}: {error}") from None
    except FileNotFoundError:
        copies = []
    except OSError as error:
        if error.filename and str(cache) in str(error.filename):
            raise
        raise UserError(
            f"download.source={source} cannot be read ({error}): check the address and your rights"
        ) from None
    if not copies:
        raise UserError(f"download.source={source} names no files")
    return copies


def _copy(files: fsspec.AbstractFileSystem, name: str, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(copy.name + ".partial")
    total = files.size(name)
    with (
        files.open(name, "rb") as source,
        open(partial, "wb") as target,
        progress(PurePosixPath(name).name, total=total, unit="B") as bar,
    ):
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
            bar.update(len(chunk))
    os.replace(partial, copy)
