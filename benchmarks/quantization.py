"""Weights of one byte or half a byte in PyTorch: memory, speed and the cost in perplexity.

    python -m benchmarks.quantization                # data/model on data/tokens, as `dvc repro` leaves them
    python -m benchmarks.quantization --large        # 14 million random weights: memory and speed alone

Tokens per second are for generating one at a time with the KV cache, batch 1: the median of 200 steps.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinygpt.generate.decoder import Decoder
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import QUANTIZED, quantize
from tinygpt.model.weights import load_model
from tinygpt.params import load_params
from tinygpt.report.perplexity import llamacpp_report
from tinygpt.tokens import load_tokens

N_STEPS = 200
N_TOKENS = 4096
LARGE: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "tie_weights": True}
DERIVED: dict[str, Any] = {"n_kv_head": None, "head_dim": None, "n_hidden": None}
VOCAB_SIZE = 8192


def large_model() -> GPT:
    """The model of params.yaml, larger."""
    params = dataclasses.replace(load_params(ModelParams), **LARGE, **DERIVED)
    return GPT(GPTConfig(**config_fields(params), vocab_size=VOCAB_SIZE)).eval()


def tokens_per_second(model: GPT) -> float:
    """Generate one token after another, following a prompt of eight."""
    times = []
    n_steps = min(N_STEPS, model.config.block_size - 8)
    decoder = Decoder(model, [[0] * 8])
    for _ in range(n_steps):
        began = time.perf_counter()
        decoder.step([0])
        times.append(time.perf_counter() - began)
    return 1 / float(np.median(times))


def perplexity(model: GPT) -> float:
    """Perplexity on the first N_TOKENS test tokens, by llama-perplexity's protocol."""
    tokens = load_tokens("data/tokens", "test")[:N_TOKENS]
    return float(llamacpp_report(model, tokens, n_ctx=model.config.block_size)["ppl"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="14 million random weights instead of data/model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| weights | memory | tokens a second | perplexity |\n|---|---|---|---|")
    for kind in ("float32", *QUANTIZED):
        model = large_model() if args.large else load_model(Path("data/model"))
        if kind != "float32":
            quantize(model, kind)
        ppl = "" if args.large else f"{perplexity(model):.2f}"
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        print(f"| {kind} | {size / 1e6:.1f} MB | {tokens_per_second(model):,.0f} | {ppl} |")


if __name__ == "__main__":
    main()
