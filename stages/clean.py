"""Clean the corpus: repair and filter documents, drop repeated ones, split into train, val and test."""

from __future__ import annotations

import sys
from pathlib import Path

from tinygpt.corpus.clean import CleanParams, clean
from tinygpt.errors import program
from tinygpt.files import human_bytes, write_json
from tinygpt.params import check_params, load_params
from tinygpt.runtime import RuntimeParams

RAW = Path("data/raw")
CLEAN = Path("data/clean")
REPORT = Path("reports/clean.json")
MOST_NAMED = 10  # files whose repairs are told; the report has the sum


@program
def main() -> None:
    """Read the `clean` group, fill data/clean and write reports/clean.json."""
    check_params()  # so that a mistake in any group is told before the work
    params, runtime = load_params(CleanParams, RuntimeParams)
    report, repaired = clean(params, RAW, CLEAN, runtime)
    write_json(REPORT, report)
    for name, n in list(repaired.items())[:MOST_NAMED]:
        print(f"clean: {n:,} bytes of {name} were no UTF-8 and became U+FFFD", file=sys.stderr)
    splits = ", ".join(
        f"{split} {report[f'{split}_documents']:,} ({human_bytes(report[f'{split}_bytes'])})"
        for split in ("train", "val", "test")
    )
    print(f"clean: {report['documents_in']:,} documents ({human_bytes(report['bytes_in'])}) -> {splits}")


if __name__ == "__main__":
    main()
