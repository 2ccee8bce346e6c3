"""Turn the documents into token files.

Reads data/clean and data/tokenizer, writes data/tokens/{train,val,test}.bin and meta.json.
"""

from pathlib import Path

from tinygpt.corpus.folders import SPLITS
from tinygpt.encode import encode_corpus
from tinygpt.files import human_bytes, runs_folder
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import CLEAN, TOKENIZER, TOKENS
from tinygpt.runtime import RuntimeParams
from tinygpt.stage import run_stage


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    runtime = load_params(RuntimeParams, path=root / PARAMS_FILE)
    meta = encode_corpus(root / CLEAN, root / TOKENIZER, root / TOKENS, runtime, runs=runs_folder(root))
    for name in SPLITS:
        split = meta.split(name)
        ratio = split.bytes / max(1, split.tokens)
        print(f"encode: {name} {split.tokens:,} tokens, {human_bytes(split.bytes)} of text, {ratio:.2f} bytes a token")


if __name__ == "__main__":
    run_stage(run)
