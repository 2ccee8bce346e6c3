"""Every combination of switches on tiny random models: exported, loaded in real llama.cpp and transformers, compared.

    python -m benchmarks.export_matrix                # all: 48 combinations × 3 biases × 3 kinds of heads × tied or not
    python -m benchmarks.export_matrix --windows      # the same with sliding windows
    python -m benchmarks.export_matrix --head-dim 24  # the same with heads wider than n_embd / n_head

Each row has the largest difference of a log-probability over all tokens at 48 positions, and over all biases, heads and
ties that the program covers; the others must be refused. If a window only shortens the context, one model per family is
run: the plain table has its biases, heads and ties. Weights are random and large, so that a wrong layout shows.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from tqdm import tqdm

from tinygpt.export.families import ANY_BIAS, CORE, LLAMA_CPP, find_family
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR

EOS = "<|endoftext|>"
N_TOKENS = 48
Windows = list[tuple[int | None, int | None]]  # window and full_every
PLAIN: Windows = [(None, None)]
SLIDING: Windows = [(16, None), (16, 2)]
Found = dict[tuple[object, ...], dict[str, list[tuple[str, float]]]]
SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "head_dim": None,
    "n_hidden": 96,
    "block_size": 64,
    "rope_theta": 5000.0,
    "norm_eps": 2e-3,
    "dropout": 0.0,
    "attention": "sdpa",
    "vocab_size": 257,
}


def random_model(config: GPTConfig) -> GPT:
    """A model in which every weight matters: norms and biases are random too, and the logits are spread out."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def difference_in_llama_cpp(model: GPT, tokenizer: Tokenizer, folder: Path, n_tokens: int) -> float:
    """The largest difference of a log-probability in an F32 GGUF file."""
    export_gguf(model, tokenizer, folder / "model.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, 256, n_tokens)
    with LlamaCpp(folder / "model.gguf") as llama:
        return _difference(model, ids, torch.from_numpy(llama.logits(ids.tolist())))


def difference_in_transformers(model: GPT, tokenizer: Tokenizer, folder: Path, n_tokens: int) -> float:
    """The same for the exported transformers folder."""
    tokenizer.save(folder)
    export_hf(model, tokenizer, folder, folder / "hf")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    loaded, info = load(folder / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = np.random.default_rng(0).integers(0, 256, n_tokens)
    with torch.inference_mode():
        return _difference(model, ids, loaded.eval()(torch.from_numpy(ids)[None]).logits[0])


def _difference(model: GPT, ids: np.ndarray, theirs: torch.Tensor) -> float:
    with torch.inference_mode():
        ours = model(torch.from_numpy(ids)[None])[0].log_softmax(-1)
    assert ours.std() > 0.5
    return float((ours - theirs.log_softmax(-1)).abs().max())


PROGRAMS = ((LLAMA_CPP, difference_in_llama_cpp), (TRANSFORMERS, difference_in_transformers))


def run(windows: Windows = PLAIN, head_dim: int | None = None) -> Found:
    """Every combination -> program -> (family and its context, difference) of each model that it covers."""
    transformers.logging.set_verbosity_error()
    tokenizer = Tokenizer([*BYTE_TO_CHAR, EOS], [], {EOS: 256})
    found: Found = defaultdict(lambda: defaultdict(list))
    variants = list(product(product(*CORE.values()), windows, ANY_BIAS, (4, 2, 1), (False, True)))
    for core, (window, full_every), bias, n_kv_head, tied in tqdm(variants):
        switches = SIZES | dict(zip(CORE, core, strict=True)) | {"window": window, "full_every": full_every}
        switches["head_dim"] = head_dim
        config = GPTConfig(**switches, bias=bias, n_kv_head=n_kv_head, tie_weights=tied)
        if not any(find_family(target.families, config) for target, _ in PROGRAMS):
            continue
        model = random_model(config)
        for target, difference in PROGRAMS:
            if family := find_family(target.families, config):
                entries, shortened = found[(*core, window, full_every)][target.name], family[1] < config.block_size
                name = f"{family[0].name}, context {family[1]}" if shortened else family[0].name
                worst = dict(entries).get(name) if shortened else None  # of the one model that is run
                if worst is None:
                    with tempfile.TemporaryDirectory() as folder:
                        worst = difference(model, tokenizer, Path(folder), min(N_TOKENS, family[1]))
                entries.append((name, worst))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", action="store_true", help="with a sliding window in all layers or every second")
    parser.add_argument("--head-dim", type=int, help="width of a head; n_embd / n_head is 16")
    args = parser.parse_args()
    windows = SLIDING if args.windows else PLAIN
    found = run(windows, args.head_dim)
    keys = [*CORE, *(["window", "full_every"] if windows is SLIDING else [])]
    print("|", " | ".join([*keys, *(f"{target.name} | models | difference" for target, _ in PROGRAMS)]), "|")
    print("|", " | ".join(["---"] * (len(keys) + 6)), "|")
    for combination, programs in found.items():
        cells = [str(value).lower() for value in combination[: len(keys)]]
        for target, _ in PROGRAMS:
            entries = programs.get(target.name, [])
            names = "; ".join(dict.fromkeys(name for name, _ in entries))
            worst = f"{max(value for _, value in entries):.1e}" if entries else "–"
            cells += [names or "refused", str(len(entries)), worst]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
