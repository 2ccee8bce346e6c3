"""Learn the tokenizer from the training documents, or take a ready one.

Reads data/clean/train.jsonl, writes data/tokenizer/tokenizer.json.
"""

from pathlib import Path

from tinygpt.errors import program
from tinygpt.files import human_bytes, must_exist, sha256_file
from tinygpt.params import load_params
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import cut_lines, shard_results, thin
from tinygpt.tokenizer.config import TokenizerParams
from tinygpt.tokenizer.counts import save_counts, sum_counts
from tinygpt.tokenizer.kinds import learn_tokenizer, take_tokenizer

TRAIN_FILE = Path("data/clean/train.jsonl")
TOKENIZER_DIR = Path("data/tokenizer")


@program
def main() -> None:
    """Run the stage."""
    params, runtime = load_params(TokenizerParams, RuntimeParams)
    if params.from_file:
        tokenizer = take_tokenizer(params)
    else:
        file = must_exist(TRAIN_FILE, stage="clean")
        shards = thin(cut_lines(file), params.max_bytes or file.stat().st_size)
        key = [sha256_file(file), params.max_bytes]
        with shard_results(save_counts, shards, name="count", key=key, runtime=runtime) as paths:
            tokenizer = learn_tokenizer(sum_counts(paths), params)
    tokenizer.save(TOKENIZER_DIR)
    size = sum(file.stat().st_size for file in TOKENIZER_DIR.iterdir())
    print(f"train_tokenizer: {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges, {human_bytes(size)}")


if __name__ == "__main__":
    main()
