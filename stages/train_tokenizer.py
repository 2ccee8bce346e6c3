"""Learn the tokenizer from the training documents, or take a ready one.

Reads data/clean/train.jsonl, writes data/tokenizer/tokenizer.json.
"""

import dataclasses
from pathlib import Path

from tinygpt.errors import program
from tinygpt.files import human_bytes, must_exist, runs_folder, sha256_file
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import CLEAN, TOKENIZER
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import cut_lines, shard_results, thin
from tinygpt.tokenizer.config import TokenizerParams
from tinygpt.tokenizer.counts import save_counts, sum_counts
from tinygpt.tokenizer.kinds import learn_tokenizer, take_tokenizer

CODE = "tinygpt.tokenizer.counts"  # decides the counts


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    params, runtime = load_params(TokenizerParams, RuntimeParams, path=root / PARAMS_FILE)
    if params.from_file:
        tokenizer = take_tokenizer(dataclasses.replace(params, from_file=str(root / params.from_file)))
    else:
        file = must_exist(root / CLEAN / "train.jsonl", stage="clean")
        shards = thin(cut_lines(file), params.max_bytes or file.stat().st_size)
        key = [sha256_file(file), params.max_bytes]
        with shard_results(
            save_counts, shards, name="count", key=key, code=CODE, runtime=runtime, runs=runs_folder(root)
        ) as paths:
            tokenizer = learn_tokenizer(sum_counts(paths), params)
    tokenizer.save(root / TOKENIZER)
    size = sum(file.stat().st_size for file in (root / TOKENIZER).iterdir())
    print(f"train_tokenizer: {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges, {human_bytes(size)}")


@program
def main() -> None:
    """Run the stage in this folder."""
    run(Path())


if __name__ == "__main__":
    main()
