"""Learn the tokenizer from the training documents, or take an existing one.

Reads data/clean/train.jsonl, writes data/tokenizer/tokenizer.json.
"""

import dataclasses
import os
from pathlib import Path

from tinygpt.files import checkout_of, human_bytes, runs_folder
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import CLEAN, TOKENIZER
from tinygpt.runtime import RuntimeParams
from tinygpt.stage import run_stage
from tinygpt.tokenizer.kinds import TokenizerParams, build_tokenizer


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    params, runtime = load_params(TokenizerParams, RuntimeParams, path=root / PARAMS_FILE)
    if params.from_file:
        path = os.path.expanduser(params.from_file)  # noqa: PTH111 (it leaves an unknown ~user as it is)
        is_here = (root / path).exists()  # DVC's temporary copies have tracked files only
        params = dataclasses.replace(params, from_file=str((root if is_here else checkout_of(root)) / path))
    tokenizer = build_tokenizer(params, root / CLEAN, runtime, runs=runs_folder(root))
    tokenizer.save(root / TOKENIZER)
    size = sum(file.stat().st_size for file in (root / TOKENIZER).iterdir())
    print(f"train_tokenizer: {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges, {human_bytes(size)}")


if __name__ == "__main__":
    run_stage(run)
