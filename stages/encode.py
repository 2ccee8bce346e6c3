"""Turn the documents into token files.

Reads data/clean and data/tokenizer, writes data/tokens/{train,val,test}.bin and meta.json.
"""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from tinygpt.errors import program
from tinygpt.files import atomic_folder, human_bytes, must_exist, runs_folder, sha256_file, write_json
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import CLEAN, TOKENIZER, TOKENS
from tinygpt.runtime import RuntimeParams
from tinygpt.shards import cut_lines, shard_results
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokenizer.bulk import save_ids
from tinygpt.tokens import META_FILE, SPLITS, TokensMeta, write_tokens

CODE = "tinygpt.tokenizer.bulk"  # decides the ids


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    runtime = load_params(RuntimeParams, path=root / PARAMS_FILE)
    tokenizer = load_tokenizer(root / TOKENIZER)
    tokenizer_sha256 = sha256_file(root / TOKENIZER / "tokenizer.json")
    work = partial(save_ids, tokenizer=(root / TOKENIZER).absolute())
    with atomic_folder(root / TOKENS) as folder:
        splits = {}
        for name in SPLITS:
            file = must_exist(root / CLEAN / f"{name}.jsonl", stage="clean")
            key = [sha256_file(file), tokenizer_sha256]
            with shard_results(
                work,
                cut_lines(file),
                name=f"encode-{name}",
                key=key,
                code=CODE,
                runtime=runtime,
                runs=runs_folder(root),
            ) as paths:
                parts = (np.fromfile(path, tokenizer.dtype) for path in paths)
                splits[name] = write_tokens(folder / f"{name}.bin", parts, tokenizer)
        meta = TokensMeta(
            dtype=tokenizer.dtype.str,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer_sha256,
            **splits,
        )
        write_json(folder / META_FILE, dataclasses.asdict(meta))
    for name, split in splits.items():
        ratio = split.bytes / max(1, split.tokens)
        print(f"encode: {name} {split.tokens:,} tokens, {human_bytes(split.bytes)} of text, {ratio:.2f} bytes a token")


if __name__ == "__main__":
    program(run)(Path())
