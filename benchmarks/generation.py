"""Speed of generation next to transformers, llama.cpp, CTranslate2, OpenVINO GenAI and no cache at all: same weights,
same threads, side by side.

    python -m benchmarks.generation                 # 11 million random weights, 2 threads
    python -m benchmarks.generation --threads 4 --rounds 9
    python -m benchmarks.generation --pair FOLDER   # speculative decoding alone, of what benchmarks/pair.py trained

Every program takes the likeliest token, on the CPU, in float32 or with 8-bit weights. In float32 all must take the
same, but in up to a tenth of a batch's rows (the cache of llama.cpp's slots is in float16). A round runs all of them
once, one after the other; the table has medians over the rounds. Prompts have 200 tokens, or 64 in a batch of 32;
reading them does not count in the time per token. CTranslate2 and OpenVINO GenAI take part if they are installed (pip
install ctranslate2 openvino-genai); the latter reads GGUF files, F16 because it does not read F32. Speculative
decoding continues N_TEXT classes of made-up code.
"""

import argparse
import copy
import ctypes
import dataclasses
import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from tqdm import tqdm

from benchmarks.export_matrix import EOS, random_model
from benchmarks.pair import TARGET, repetitive_text
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.llamacpp import Batch, LlamaCpp
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

CONFIG = GPTConfig(**TARGET, vocab_size=2048)
N_PROMPT, N_NEW = 200, 48
BATCH_SIZE, N_BATCH_PROMPT, N_BATCH_NEW = 32, 64, 96
N_SAME = 8  # tokens after each prompt that must be the same
N_TEXT, N_TEXT_PROMPT, N_TEXT_NEW = 3, 300, 100  # texts, characters of each used as the prompt, tokens that follow
Speed = tuple[float, float]  # seconds until the first token, and for each one after it
Run = Callable[[], Speed]
Rows = list[list[int]]
Generate = Callable[[Rows, int], Rows]  # prompts of equal length, n -> n tokens after each, the likeliest ones
# ours -> the comparable programs, alone and in a batch
OTHERS = {
    "": ("transformers", "llama.cpp F32", "CTranslate2", "OpenVINO GenAI F16"),
    " int8": ("llama.cpp Q8_0", "CTranslate2 int8", "OpenVINO GenAI Q8_0"),
}
# (what is measured, ours, the other, which of the two times, rows)
MEASURES = [
    ("batch 1", "ours", "recompute at 256", 1, 1),
    *(
        (f"batch {n_row}{kind}{how}", f"ours{kind}{batch}{how}", f"{other}{batch}", 1, n_row)
        for batch, n_row in (("", 1), (" batch", BATCH_SIZE))
        for how in ("", ", compiled")
        for kind, others in OTHERS.items()
        for other in others
    ),
    *((f"first token after {N_PROMPT}", "ours", other, 0, 1) for other in OTHERS[""]),
]

HOW = {"likeliest": Sampling(temperature=0, ignore_eos=True), "temperature 0.8": Sampling(temperature=0.8, top_p=0.95)}


def random_prompts(n: int, n_token: int) -> list[list[int]]:
    """Ids drawn uniformly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG.vocab_size - 1, (n, n_token), generator=generator).tolist()


def pairs_tokenizer() -> Tokenizer:
    """A vocabulary of CONFIG's size: the bytes and the first pairs of them."""
    alphabet = list(BYTE_TO_CHAR)
    merges = [(a, b) for a in alphabet for b in alphabet][: CONFIG.vocab_size - len(alphabet) - 1]
    tokens = [*alphabet, *(a + b for a, b in merges), EOS]
    return Tokenizer(tokens, merges, {EOS: len(tokens) - 1})


def time_decoder(model: GPT, prompts: list[list[int]], n_new: int) -> Speed:
    """Time our own decoder."""
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
    """Time the model without a cache: a full context for each token."""
    ids = torch.tensor(random_prompts(1, CONFIG.block_size))
    began = time.perf_counter()
    for _ in range(3):
        int(model.lm_head(model.hidden(ids)[:, -1]).argmax())
    each = (time.perf_counter() - began) / 3
    return each, each


def time_twice(generate: Callable[[int], object], n_new: int) -> Speed:
    """Time a function that generates tokens: one call for one token, and one for `n_new` more."""
    began = time.perf_counter()
    generate(1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    generate(1 + n_new)
    return first, (time.perf_counter() - began - first) / n_new


def transformers_of(folder: Path) -> Generate:
    """`generate` of transformers, with its cache."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / "hf").eval()

    def generate(prompts: Rows, n: int) -> Rows:
        ids = torch.tensor(prompts)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        found: torch.Tensor = model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
        return found[:, ids.size(1) :].tolist()

    return generate


class LlamaSlots(LlamaCpp):
    """llama.cpp with a sequence in each of BATCH_SIZE slots, all decoded together, with its defaults.

    So keys and values are in float16: in float32 a step took twice as long.
    """

    N_SLOT = BATCH_SIZE
    FIELDS: ClassVar[dict[str, Any]] = {
        "token": ctypes.c_int32,
        "pos": ctypes.c_int32,
        "n_seq_id": ctypes.c_int32,
        "seq_id": ctypes.c_void_p,
        "logits": ctypes.c_int8,
    }

    def _open_context(self, n_threads: int) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self.N_SLOT * self.n_ctx, self.N_SLOT
        params.n_threads = params.n_threads_batch = n_threads
        context: int = self._lib.llama_init_from_model(self._model, params)
        return context

    def generate(self, prompts: Rows, n: int) -> Rows:
        """As Generate, with a slot for each row."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        new = [self._append(prompts, 0)]
        for at in range(len(prompts[0]), len(prompts[0]) + n - 1):
            new.append(self._append([[id] for id in new[-1]], at))
        return [list(row) for row in zip(*new, strict=True)]

    def _append(self, rows: Rows, at: int) -> list[int]:
        """Append a row of tokens to each slot, the first at position `at` -> the likeliest next token of each."""
        slots = (ctypes.c_int32 * len(rows))(*range(len(rows)))
        tokens = [  # the fields of Batch for each
            (id, at + i, 1, ctypes.addressof(slots) + 4 * slot, i == len(row) - 1)
            for slot, row in enumerate(rows)
            for i, id in enumerate(row)
        ]
        columns = {
            name: (kind * len(tokens))(*values)
            for (name, kind), values in zip(self.FIELDS.items(), zip(*tokens, strict=True), strict=True)
        }
        fields = {name: ctypes.addressof(column) for name, column in columns.items()}
        assert self._lib.llama_decode(self._context, Batch(n_tokens=len(tokens), **fields)) == 0
        found = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(rows), self.vocab_size))
        return found.argmax(-1).tolist()


class LlamaSlot(LlamaSlots):
    """llama.cpp with one sequence."""

    N_SLOT = 1


def llama_of(path: Path, n_thread: int) -> Generate:
    """llama.cpp, one sequence or several in slots."""
    alone, slots = LlamaSlot(path, n_threads=n_thread), LlamaSlots(path, n_threads=n_thread)
    return lambda prompts, n: (alone if len(prompts) == 1 else slots).generate(prompts, n)


def ctranslate2_of(folder: Path, kind: str, n_thread: int, names: list[str]) -> Generate:
    """CTranslate2, converted from the transformers folder; it takes tokens by name."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"), force=True)
    generator = ctranslate2.Generator(str(folder / "ct2"), compute_type=kind, intra_threads=n_thread)

    def generate(prompts: Rows, n: int) -> Rows:
        rows = [[names[id] for id in prompt] for prompt in prompts]
        options = {"max_length": n, "min_length": n, "include_prompt_in_result": False}
        return [found.sequences_ids[0] for found in generator.generate_batch(rows, **options)]

    return generate


def openvino_of(path: Path, n_thread: int) -> Generate:
    """OpenVINO GenAI, from a GGUF file."""
    import openvino
    import openvino_genai

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": n_thread, "ATTENTION_BACKEND": "SDPA"}
    pipeline = openvino_genai.LLMPipeline(str(path), "CPU", **settings)

    def generate(prompts: Rows, n: int) -> Rows:
        ids, seen = (openvino.Tensor(array) for array in (np.array(prompts), np.ones_like(prompts)))
        config = openvino_genai.GenerationConfig(max_new_tokens=n, do_sample=False, ignore_eos=True)
        return pipeline.generate(openvino_genai.TokenizedInputs(ids, seen), config).tokens

    return generate


def others(folder: Path, tokenizer: Tokenizer, n_thread: int) -> dict[str, Generate]:
    """The programs that are installed, by their names in OTHERS."""
    found = {
        "transformers": transformers_of(folder),
        "llama.cpp F32": llama_of(folder / "f32.gguf", n_thread),
        "llama.cpp Q8_0": llama_of(folder / "q8_0.gguf", n_thread),
    }
    if importlib.util.find_spec("ctranslate2"):
        found["CTranslate2"] = ctranslate2_of(folder, "float32", n_thread, tokenizer.tokens)
        found["CTranslate2 int8"] = ctranslate2_of(folder, "int8", n_thread, tokenizer.tokens)
    if importlib.util.find_spec("openvino_genai"):
        found["OpenVINO GenAI F16"] = openvino_of(folder / "f16.gguf", n_thread)
        found["OpenVINO GenAI Q8_0"] = openvino_of(folder / "q8_0.gguf", n_thread)
    return found


def check_same(model: GPT, theirs: dict[str, Generate], prompts: Rows) -> None:
    """Raise if a program that computes in float32 takes other tokens than ours in more than a tenth of the rows."""
    decoder, steps = Decoder(model, prompts), []
    for _ in range(N_SAME):
        steps.append(decoder.logits.argmax(-1).tolist())
        decoder.step(steps[-1])
    ours = [list(row) for row in zip(*steps, strict=True)]
    for name in OTHERS[""]:
        if name in theirs:
            differs = sum(a != b for a, b in zip(ours, theirs[name](prompts, N_SAME), strict=True))
            assert differs <= len(prompts) // 10, f"{name} differs in {differs} rows"


def time_proposals(model: GPT, answers: list[Answer], speculation: Speculation | None) -> Speed:
    """Time texts continued one after the other, with or without proposals; their first tokens are not timed."""
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
    """The runs to measure, by name, and the answers of each one's last run."""
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
    """The runs to measure, by name."""
    if importlib.util.find_spec("openvino_genai"):
        importlib.import_module("openvino_genai")  # first: loaded after llama.cpp's library, it crashes
    model, tokenizer = random_model(CONFIG).half().float(), pairs_tokenizer()  # so that F16 is exact
    single, many = random_prompts(1, N_PROMPT), random_prompts(BATCH_SIZE, N_BATCH_PROMPT)
    tokenizer.save(folder)
    export_hf(model, tokenizer, folder, folder / "hf")
    for kind in ("f32", "f16", "q8_0"):
        export_gguf(model, tokenizer, folder / f"{kind}.gguf", kind)
    runs: dict[str, Run] = {"recompute at 256": lambda: time_recompute(model)}
    for kind, how in product(("", " int8"), ("", ", compiled")):
        one = copy.deepcopy(model)
        if kind:
            quantize(one, kind.strip())
        if how:
            compile_step(one, n_row=BATCH_SIZE)
        runs[f"ours{kind}{how}"] = partial(time_decoder, one, single, N_NEW)
        runs[f"ours{kind} batch{how}"] = partial(time_decoder, one, many, N_BATCH_NEW)
    theirs = others(folder, tokenizer, n_thread)
    check_same(model, theirs, many)
    for name, generate in theirs.items():
        runs[name] = partial(time_twice, partial(generate, single), N_NEW)
        runs[f"{name} batch"] = partial(time_twice, partial(generate, many), N_BATCH_NEW)
    return runs


def medians(runs: dict[str, Run], n_round: int) -> dict[str, Speed]:
    """Median times of all programs, run in turn."""
    for run in runs.values():
        run()  # to warm up
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
    print("| tokens a second | tinygpt | next to | theirs | ratio |\n|---|---|---|---|---|")
    for measure, our_name, their_name, at, n_row in MEASURES:
        if their_name in speeds:
            ours, theirs = (n_row / speeds[name][at] for name in (our_name, their_name))
            print(f"| {measure} | {ours:,.1f} | {their_name} | {theirs:,.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
