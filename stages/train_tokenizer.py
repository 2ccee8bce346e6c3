"""Learn the tokenizer from the training documents.

Reads data/clean/train.jsonl, writes data/tokenizer/tokenizer.json.
"""

from pathlib import Path

from tinygpt.corpus.jsonl import iter_texts
from tinygpt.errors import program
from tinygpt.files import human_bytes
from tinygpt.params import load_params
from tinygpt.tokenizer.bpe import TokenizerParams, train_bpe

TRAIN_FILE = Path("data/clean/train.jsonl")
TOKENIZER_DIR = Path("data/tokenizer")


@program
def main() -> None:
    """Run the stage."""
    params = load_params(TokenizerParams)
    tokenizer = train_bpe(
        iter_texts(TRAIN_FILE),
        params.vocab_size,
        min_frequency=params.min_frequency,
        special_tokens=params.special_tokens,
    )
    tokenizer.save(TOKENIZER_DIR)
    size = sum(file.stat().st_size for file in TOKENIZER_DIR.iterdir())
    print(f"train_tokenizer: {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges, {human_bytes(size)}")


if __name__ == "__main__":
    main()
