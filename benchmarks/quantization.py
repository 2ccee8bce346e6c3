"""Weights of one byte or half of one in PyTorch: memory, speed and what it costs.

    python -m benchmarks.quantization                # data/model on data/tokens, as `dvc repro` leaves them
    python -m benchmarks.quantization --large        # 11 million random weights: memory and speed alone

Tokens a second are of generation one by one with the KV cache, batch 1: the median of 200 steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinygpt.evaluate.perplexity import scored_nll, token_logprobs
from tinygpt.model import GPT, GPTConfig, load_model
from tinygpt.model.kv_cache import KVCache
from tinygpt.model.quantize import KINDS, n_bytes, quantize
from tinygpt.tokens import load_tokens

N_STEPS = 200
LARGE: dict[str, Any] = {
    "vocab_size": 8192,
    "n_layer": 6,
    "n_head": 6,
    "n_kv_head": None,
    "n_embd": 384,
    "head_dim": None,
    "n_hidden": None,
    "block_size": 256,
    "position": "rope",
    "rope_theta": 10000.0,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "mlp": "swiglu",
    "parallel_block": False,
    "window": None,
    "full_every": None,
    "bias": "none",
    "qk_norm": False,
    "tie_weights": True,
    "dropout": 0.0,
    "attention": "sdpa",
}


def tokens_per_second(model: GPT) -> float:
    """One token after the other, behind a prompt of eight."""
    times = []
    n_steps = min(N_STEPS, model.config.block_size - 8)
    with torch.inference_mode():
        cache = KVCache(model.config, max_tokens=model.config.block_size)
        model(torch.zeros(1, 8, dtype=torch.long), cache)
        for _ in range(n_steps):
            began = time.perf_counter()
            model(torch.zeros(1, 1, dtype=torch.long), cache)
            times.append(time.perf_counter() - began)
    return 1 / float(np.median(times))


def perplexity(model: GPT) -> float:
    """Of the first 4096 test tokens, by llama-perplexity's protocol."""
    size = model.config.block_size
    ids = load_tokens("data/tokens", "test")[:4096].astype(np.int64)
    chunks = ids[: len(ids) // size * size].reshape(-1, size)
    nll = [scored_nll(token_logprobs(model, chunk), chunk) for chunk in chunks]
    return float(np.exp(np.mean(nll, dtype=np.float64)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="11 million random weights instead of data/model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| weights | memory | tokens a second | perplexity |\n|---|---|---|---|")
    for kind in ("float32", *KINDS):
        model = GPT(GPTConfig(**LARGE)).eval() if args.large else load_model(Path("data/model"))
        if kind != "float32":
            quantize(model, kind)
        ppl = "" if args.large else f"{perplexity(model):.2f}"
        print(f"| {kind} | {n_bytes(model) / 1e6:.1f} MB | {tokens_per_second(model):,.0f} | {ppl} |")


if __name__ == "__main__":
    main()
