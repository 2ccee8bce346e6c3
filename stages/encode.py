"""Turn the documents into token files.

Reads data/clean and data/tokenizer, writes data/tokens/{train,val,test}.bin and meta.json.
"""

import dataclasses
from pathlib import Path

from tinygpt.corpus.jsonl import iter_texts
from tinygpt.errors import program
from tinygpt.files import atomic_folder, human_bytes, sha256_file, write_json
from tinygpt.progress import progress
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokens import META_FILE, SPLITS, TokensMeta, write_tokens

CLEAN_DIR = Path("data/clean")
TOKENIZER_DIR = Path("data/tokenizer")
TOKENS_DIR = Path("data/tokens")


@program
def main() -> None:
    """Run the stage."""
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    with atomic_folder(TOKENS_DIR) as folder, progress("encode", unit="B") as bar:
        splits = {}
        for name in SPLITS:
            documents = iter_texts(CLEAN_DIR / f"{name}.jsonl", on_bytes=bar.update)
            splits[name] = write_tokens(folder / f"{name}.bin", documents, tokenizer)
        meta = TokensMeta(
            dtype=tokenizer.dtype.str,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=sha256_file(TOKENIZER_DIR / "tokenizer.json"),
            **splits,
        )
        write_json(folder / META_FILE, dataclasses.asdict(meta))
    for name, split in splits.items():
        ratio = split.bytes / max(1, split.tokens)
        print(f"encode: {name} {split.tokens:,} tokens, {human_bytes(split.bytes)} of text, {ratio:.2f} bytes a token")


if __name__ == "__main__":
    main()
