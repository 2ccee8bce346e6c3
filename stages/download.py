"""Get the corpus: from `download.source` to text files and a manifest in data/raw."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tinygpt.corpus.download import download
from tinygpt.corpus.sources import DownloadParams
from tinygpt.errors import program
from tinygpt.files import human_bytes
from tinygpt.params import check_params, load_params

RAW = Path("data/raw")
MOST_NAMED = 10  # files that are left out
CACHE = Path("data/.downloads")  # whole and partial downloads, outside of every DVC output


@program
def main() -> None:
    """Read the `download` group and fill data/raw."""
    check_params()  # so that a mistake in any group is told before the work
    params = load_params(DownloadParams)
    # DVC sets DVC_ROOT, in its temporary copies to the checkout they belong to: all kinds of runs share one cache.
    root = Path(os.environ.get("DVC_ROOT", "."))
    downloaded = download(params, RAW, root=root, cache=root / CACHE)
    files = downloaded.manifest.files
    size = human_bytes(sum(file.bytes for file in files))
    print(f"download: {params.source}, {size} of text, files: {len(files):,}")
    if skipped := downloaded.skipped:
        more = f" and {len(skipped) - MOST_NAMED:,} more" if len(skipped) > MOST_NAMED else ""
        print(f"download: no text and left out: {', '.join(skipped[:MOST_NAMED])}{more}", file=sys.stderr)


if __name__ == "__main__":
    main()
