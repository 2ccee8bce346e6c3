"""Clean the corpus: repair and filter documents, drop repeated ones, split into train, val and test."""

import sys
from pathlib import Path

from tinygpt.corpus.clean import CleanParams, clean
from tinygpt.corpus.folders import SPLITS
from tinygpt.corpus.split import little_held_out
from tinygpt.errors import printable
from tinygpt.files import human_bytes, runs_folder, write_json
from tinygpt.params import PARAMS_FILE, check_params, load_params
from tinygpt.paths import CLEAN, RAW, REPORTS
from tinygpt.runtime import RuntimeParams
from tinygpt.stage import run_stage

DROPPED = {  # counts in clean.json: why documents are dropped
    "too_short": "by clean.min_bytes",
    "exact_duplicates": "by clean.exact_duplicates",
    "near_duplicates": "by clean.near_duplicates",
    "leaked": "from train, as val or test has the same",
}
MOST_NAMED = 10  # files whose repairs are reported; clean.json has the sum


def run(root: Path) -> None:
    """Read the `clean` group, fill data/clean and write reports/clean.json."""
    params, runtime = load_params(CleanParams, RuntimeParams, path=root / PARAMS_FILE)
    evaluated = check_params(root / PARAMS_FILE)["evaluate"].split  # an empty split would only show after training
    report, repaired, how = clean(
        params, root / RAW, root / CLEAN, runtime, evaluated=evaluated, runs=runs_folder(root)
    )
    write_json(root / REPORTS / "clean.json", report)
    for name, n in list(repaired.items())[:MOST_NAMED]:
        found = f"{n:,} bytes of {printable(name)} were not UTF-8 and became U+FFFD"
        print(f"clean: {found}: if they are text, repair the file or set download.encoding", file=sys.stderr)
    splits = ", ".join(
        f"{split} {report[f'{split}_documents']:,} ({human_bytes(report[f'{split}_bytes'])})" for split in SPLITS
    )
    read = f"{report['documents_in']:,} document{'s' * (report['documents_in'] != 1)}"
    print(f"clean: {read} ({human_bytes(report['bytes_in'])}) -> {splits}; split by {how}")
    if dropped := [f"{report[count]:,} {why}" for count, why in DROPPED.items() if report[count]]:
        print(f"clean: dropped {', '.join(dropped)}")
    if little := little_held_out(report, how):
        print(f"clean: {' and '.join(little)}: results measured on so little text are unreliable", file=sys.stderr)


if __name__ == "__main__":
    run_stage(run)
