"""Get the corpus: from `download.source` to text files and a manifest in data/raw."""

import sys
from pathlib import Path

from tinygpt.corpus.download import download
from tinygpt.corpus.sources import DownloadParams
from tinygpt.errors import printable
from tinygpt.files import checkout_of, human_bytes
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import RAW
from tinygpt.stage import run_stage

CACHE = Path("data/.downloads")  # complete and partial downloads, outside every DVC output


def run(root: Path) -> None:
    """Read the `download` group and fill data/raw."""
    params, checkout = load_params(DownloadParams, path=root / PARAMS_FILE), checkout_of(root)
    downloaded = download(params, root / RAW, root=checkout, cache=checkout / CACHE)
    files = downloaded.manifest.files
    size = human_bytes(sum(file.bytes for file in files))
    print(f"download: {printable(params.source)}, {size} of text, files: {len(files):,}")
    if downloaded.notes.names:
        print(f"download: {downloaded.notes}", file=sys.stderr)


if __name__ == "__main__":
    run_stage(run)
