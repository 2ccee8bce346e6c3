"""Speed of generation beside transformers, llama.cpp and no cache at all: same weights, same threads, side by side.

    python -m benchmarks.generation                 # 11 million random weights, 2 threads
    python -m benchmarks.generation --threads 4 --rounds 9
    python -m benchmarks.generation --pair FOLDER   # speculative decoding alone, of what benchmarks/pair.py trained

Every program takes the likeliest token, on the CPU in float32 or with 8-bit weights. A round runs all of them once, one
after the other; the table has medians over the rounds. Prompts have 200 tokens, or 64 in a batch of 32, and are read
outside of what the time for a token counts. Speculative decoding continues N_TEXT classes of made-up code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tqdm import tqdm

from benchmarks.export_matrix import EOS, random_model
from benchmarks.pair import TARGET, repetitive_text
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.generate import Answer, Sampling, Speculation
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.decoder import Decoder
from tinygpt.generate.stream import extend
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import QUANTIZED, quantize
from tinygpt.model.weights import load_model, load_pair
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import BYTE_TO_CHAR

CONFIG: dict[str, Any] = TARGET | {"vocab_size": 2048}
N_PROMPT, N_NEW = 200, 48
BATCH_SIZE, N_BATCH_PROMPT, N_BATCH_NEW = 32, 64, 12
N_TEXT, N_TEXT_PROMPT, N_TEXT_NEW = 3, 300, 100  # texts, characters of each that are the prompt, tokens that follow
Speed = tuple[float, float]  # seconds until the first token, and for each one after it
Run = Callable[[], Speed]
# (what is measured, ours, the other, which of the two times, rows)
MEASURES = [
    *(
        (f"batch 1{how}, tokens a second", f"ours{kind}{how}", theirs, 1, 1)
        for how in ("", ", compiled")
        for kind, theirs in (
            ("", "recompute at 256"),
            ("", "transformers"),
            ("", "llama.cpp F32"),
            (" int8", "llama.cpp Q8_0"),
        )
    ),
    *(
        (f"batch {BATCH_SIZE}{how}, tokens a second", f"ours batch{how}", "transformers batch", 1, BATCH_SIZE)
        for how in ("", ", compiled")
    ),
    (f"first token after {N_PROMPT}, a second", "ours", "llama.cpp F32", 0, 1),
    (f"first token after {N_PROMPT}, a second", "ours", "transformers", 0, 1),
]

HOW = {"likeliest": Sampling(temperature=0, ignore_eos=True), "temperature 0.8": Sampling(temperature=0.8, top_p=0.95)}


def random_prompts(n: int, n_token: int) -> list[list[int]]:
    """Ids drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG["vocab_size"] - 1, (n, n_token), generator=generator).tolist()


def pairs_tokenizer() -> Tokenizer:
    """A vocabulary of CONFIG's size: the bytes and the first pairs of them."""
    alphabet = list(BYTE_TO_CHAR)
    merges = [(a, b) for a in alphabet for b in alphabet][: CONFIG["vocab_size"] - len(alphabet) - 1]
    tokens = [*alphabet, *(a + b for a, b in merges), EOS]
    return Tokenizer(tokens, merges, {EOS: len(tokens) - 1})


def time_decoder(model: GPT, prompts: list[list[int]], n_new: int) -> Speed:
    """Of our own decoder."""
    began = time.perf_counter()
    decoder = Decoder(model, prompts)
    ids = decoder.logits.argmax(-1).tolist()
    first = time.perf_counter() - began
    for _ in range(n_new):
        decoder.step(ids)
        ids = decoder.logits.argmax(-1).tolist()
    return first, (time.perf_counter() - began - first) / n_new


@torch.inference_mode()
def time_recompute(model: GPT) -> Speed:
    """Of the model over a full context, for each token anew."""
    ids = torch.tensor(random_prompts(1, CONFIG["block_size"]))
    began = time.perf_counter()
    for _ in range(3):
        int(model.lm_head(model.hidden(ids)[:, -1]).argmax())
    each = (time.perf_counter() - began) / 3
    return each, each


def time_twice(generate: Callable[[int], object], n_new: int) -> Speed:
    """Of a function that generates a number of tokens: once for one of them, once for `n_new` more."""
    began = time.perf_counter()
    generate(1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    generate(1 + n_new)
    return first, (time.perf_counter() - began - first) / n_new


def time_transformers(model: Any, prompts: list[list[int]], n_new: int) -> Speed:
    """Of `generate` with its cache."""
    ids = torch.tensor(prompts)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    return time_twice(lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options), n_new)


def time_llama(llama: LlamaCpp, prompt: list[int], n_new: int) -> Speed:
    """Of llama.cpp with its cache."""
    return time_twice(lambda n: llama.greedy(prompt, n), n_new)


def time_proposals(model: GPT, answers: list[Answer], speculation: Speculation | None) -> Speed:
    """Of texts that are continued one after the other, with proposals or without; the first token is not measured."""
    seconds = 0.0
    for answer in answers:
        steps = extend(model, [answer], speculation=speculation)
        next(steps)
        began = time.perf_counter()
        for _ in steps:
            pass
        seconds += time.perf_counter() - began
    return 0.0, seconds / sum(len(answer.ids) - 1 for answer in answers)


def speculative_programs(
    folder: Path, n_draft: int, kind: str | None
) -> tuple[dict[str, Run], dict[str, list[Answer]]]:
    """What is measured, by name, and the answers of each one's last run."""
    model, tokenizer = load_pair(folder / "model", folder / "tokenizer")
    compiled, (draft, compiled_draft) = load_model(folder / "model"), [load_model(folder / "draft") for _ in range(2)]
    if kind:
        quantize(model, kind)
        quantize(compiled, kind)
    compile_step(compiled)
    compile_step(compiled_draft, room=n_draft)
    prompts = [text[:N_TEXT_PROMPT] for text in repetitive_text(N_TEXT, seed=1)]
    look_up = Speculation(n_draft=n_draft)
    ways = {
        "without": (model, None),
        "draft": (model, dataclasses.replace(look_up, draft=draft)),
        "look-up": (model, look_up),
        "compiled without": (compiled, None),
        "compiled draft": (model, dataclasses.replace(look_up, draft=compiled_draft)),
        "compiled look-up": (compiled, look_up),
    }
    written: dict[str, list[Answer]] = {}

    def run(name: str, sampling: Sampling, model: GPT, speculation: Speculation | None) -> Speed:
        sizes = {"max_new_tokens": N_TEXT_NEW, "block_size": model.config.block_size}
        written[name] = [Answer(prompt, tokenizer, sampling, **sizes) for prompt in prompts]
        return time_proposals(model, written[name], speculation)

    runs = {
        f"{how}, {source}": partial(run, f"{how}, {source}", sampling, *way)
        for how, sampling in HOW.items()
        for source, way in ways.items()
    }
    return dict(runs), written


def programs(folder: Path, n_thread: int) -> dict[str, Run]:
    """What is measured, by name."""
    model, small, compiled, compiled_small = (random_model(GPTConfig(**CONFIG)) for _ in range(4))
    for one in small, compiled_small:
        quantize(one, "int8")
    for one, n_row in (compiled, BATCH_SIZE), (compiled_small, 1):
        compile_step(one, n_row=n_row)
    tokenizer = pairs_tokenizer()
    tokenizer.save(folder)
    export_hf(model, tokenizer, folder, folder / "hf")
    export_gguf(model, tokenizer, folder / "f32.gguf", "f32")
    export_gguf(model, tokenizer, folder / "q8_0.gguf", "q8_0")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder / "hf").eval()
    llamas = {kind: LlamaCpp(folder / f"{kind}.gguf", n_threads=n_thread) for kind in ("f32", "q8_0")}
    single, many = random_prompts(1, N_PROMPT), random_prompts(BATCH_SIZE, N_BATCH_PROMPT)
    return {
        "ours": lambda: time_decoder(model, single, N_NEW),
        "llama.cpp F32": lambda: time_llama(llamas["f32"], single[0], N_NEW),
        "ours, compiled": lambda: time_decoder(compiled, single, N_NEW),
        "ours int8": lambda: time_decoder(small, single, N_NEW),
        "llama.cpp Q8_0": lambda: time_llama(llamas["q8_0"], single[0], N_NEW),
        "ours int8, compiled": lambda: time_decoder(compiled_small, single, N_NEW),
        "transformers": lambda: time_transformers(theirs, single, N_NEW),
        "recompute at 256": lambda: time_recompute(model),
        "ours batch": lambda: time_decoder(model, many, N_BATCH_NEW),
        "ours batch, compiled": lambda: time_decoder(compiled, many, N_BATCH_NEW),
        "transformers batch": lambda: time_transformers(theirs, many, N_BATCH_NEW),
    }


def medians(runs: dict[str, Run], n_round: int) -> dict[str, Speed]:
    """Of all programs, run in turn."""
    for run in runs.values():
        run()  # the first time is another
    speeds: dict[str, list[Speed]] = {name: [] for name in runs}
    for _ in tqdm(range(n_round)):
        for name, run in runs.items():
            speeds[name].append(run())
    return {
        name: (statistics.median(a for a, _ in s), statistics.median(b for _, b in s)) for name, s in speeds.items()
    }


def print_speculative(folder: Path, n_round: int, n_draft: int, kind: str | None) -> None:
    """The table of speculative decoding."""
    runs, written = speculative_programs(folder, n_draft, kind)
    speeds = medians(runs, n_round)
    print("| tokens a second | this way | without | ratio | tokens a pass |\n|---|---|---|---|---|")
    for name, (_, seconds) in speeds.items():
        how, source = name.rsplit(", ", 1)
        if source != "without":
            without, answers = speeds[f"{how}, without"][1], written[name]
            n_token = sum(len(answer.ids) for answer in answers)
            n_per_pass = n_token / (sum(answer.n_pass for answer in answers) or n_token)
            print(f"| {name} | {1 / seconds:,.1f} | {1 / without:,.1f} | {without / seconds:.2f} | {n_per_pass:.2f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pair", type=Path, help="measure speculative decoding instead")
    parser.add_argument("--n-draft", type=int, default=Speculation().n_draft, help="of --pair (default: %(default)s)")
    parser.add_argument("--quantize", choices=list(QUANTIZED), help="of --pair: the model's weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, medians of {args.rounds} rounds\n")
    if args.pair:
        print_speculative(args.pair, args.rounds, args.n_draft, args.quantize)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        speeds = medians(programs(Path(folder), args.threads), args.rounds)
    print("| measure | tinygpt | beside | theirs | ratio |\n|---|---|---|---|---|")
    for measure, our_name, their_name, at, n_row in MEASURES:
        ours, theirs = (n_row / speeds[name][at] for name in (our_name, their_name))
        print(f"| {measure} | {ours:,.1f} | {their_name} | {theirs:,.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
