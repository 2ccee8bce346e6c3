"""Run an exported file in real llama.cpp and hold it against the model: tokens, probabilities, perplexity, choices.

T tokens, V vocab_size. Log-probabilities are natural, ids are (T,) int64.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.evaluate.perplexity import scored_nll, token_logprobs
from tinygpt.export.config import GGUFType
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

Ids = NDArray[np.integer]
Floats = NDArray[np.float32]

CHUNK_SIZE = 512  # llama-perplexity's default context
N_PROMPT, N_NEW = 8, 32  # greedy continuations: how many, and tokens in each

# Text that tokenizers disagree on, whatever the corpus holds.
SAMPLES = (
    "It's they'LL we've I'd 'tis O'Neil''s",
    "a  b   c\t\td\n\n  e\r\nf \n g   ",
    "0 12 345,678.90 1e-5 ½ Ⅷ ٣٤ 七",
    "<|endoftext|> </s> <unk> [INST] <0x0A>",
    "x=y->z[0]; /* ~!@#$%^&*()_+ */ \\n 'a'\"b\" …—–«»„“",
    "naïve Ångström e\u0301 Straße İstanbul ﬁ ǅ",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは 안녕하세요 สวัสดี",
    "مرحبا بالعالم שלום עולם नमस्ते",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ☃️ 𝔘𝔫𝔦 𐍈",
    "\u00a0\u2003\u3000\u200b\ufeff\u0085\u2028|\x00\x01\x1c\x1f\x7f|\ufffd",
)


@dataclass(frozen=True)
class Tolerance:
    """The most that llama.cpp's arithmetic explains."""

    logprob: float  # largest difference of a log-probability, over all tokens at all positions
    ppl: float  # relative difference of perplexity


# By MLP and weight type. float32 leaves rounding, and for GELU ggml's float16 table of it; with the other types ggml
# rounds weights and activations. The most seen with llama.cpp b11549 on a CPU, trained and random models of all
# families: 2e-5, 3e-3 (gelu), 1e-2 (f16), 0.1 (bf16), 0.4 (q8_0); in perplexity 7e-5, 2e-4 (q8_0). The rest is room
# for deeper models. A wrong layout is off by whole units, and doubles the perplexity of a trained model.
TOLERANCES: Mapping[tuple[str, GGUFType], Tolerance] = {
    ("swiglu", "f32"): Tolerance(logprob=1e-3, ppl=1e-4),
    ("gelu", "f32"): Tolerance(logprob=3e-2, ppl=1e-3),
    ("swiglu", "f16"): Tolerance(logprob=0.1, ppl=1e-3),
    ("gelu", "f16"): Tolerance(logprob=0.1, ppl=1e-3),
    ("swiglu", "bf16"): Tolerance(logprob=0.6, ppl=5e-3),
    ("gelu", "bf16"): Tolerance(logprob=0.6, ppl=5e-3),
    ("swiglu", "q8_0"): Tolerance(logprob=2.0, ppl=2e-2),
    ("gelu", "q8_0"): Tolerance(logprob=2.0, ppl=2e-2),
}


def check_gguf(
    model: GPT, tokenizer: Tokenizer, path: Path, weight_type: GGUFType, ids: Ids
) -> tuple[dict[str, float | None], list[str]]:
    """Compare one file with the model on held-out `ids`, at least CHUNK_SIZE of them, and on SAMPLES.

    Returns the measures for the report, and a message for each that is out of tolerance, naming the file.
    Raises UserError when llama.cpp does not load the file.
    """
    tolerance = TOLERANCES[model.config.mlp, weight_type]
    size = min(CHUNK_SIZE, model.config.block_size)
    chunks = ids[: len(ids) // size * size].reshape(-1, size).astype(np.int64)
    with LlamaCpp(path, n_ctx=size, n_threads=torch.get_num_threads()) as llama:
        measures = {
            "wrong_tokens": count_wrong_tokens(tokenizer, llama, _texts(tokenizer, ids)),
            **compare_logprobs(model, llama, chunks),
            **compare_greedy(model, llama, chunks),
        }
    allowed = {
        "wrong_tokens": 0,
        "max_logprob_diff": tolerance.logprob,
        "ppl_rel_diff": tolerance.ppl,
        # two log-probabilities may be off, each by the tolerance, before another token comes out on top
        "max_greedy_gap": 2 * tolerance.logprob,
    }
    failures = [
        f"{path.name}: {name} is {measures[name]:.3g} in llama.cpp, allowed is {most:.3g}"
        for name, most in allowed.items()
        if not measures[name] <= most  # NaN fails too
    ]
    return {name: _rounded(value) for name, value in measures.items()}, failures


def count_wrong_tokens(tokenizer: Tokenizer, llama: LlamaCpp, texts: Iterable[str]) -> int:
    """Texts that become other ids in llama.cpp, and ids that stand for other bytes or end a text there and not here."""
    wrong_texts = sum(llama.tokenize(text) != tokenizer.encode(text) for text in texts)
    wrong_pieces = sum(llama.piece(id) != tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size))
    eog_ids = set(llama.eog_ids())
    wrong_ends = len(eog_ids - set(tokenizer.special_tokens.values())) + (tokenizer.eos_id not in eog_ids)
    return wrong_texts + wrong_pieces + wrong_ends


def compare_logprobs(model: GPT, llama: LlamaCpp, chunks: Ids) -> dict[str, float]:
    """Log-probabilities at every position of (N, T) chunks, and both perplexities by llama-perplexity's protocol."""
    largest, ours_nll, theirs_nll = 0.0, [], []
    for chunk in chunks:
        ours, theirs = token_logprobs(model, chunk), log_softmax(llama.logits(chunk.tolist()))
        largest = max(largest, float(np.abs(ours - theirs).max()))
        ours_nll.append(scored_nll(ours, chunk))
        theirs_nll.append(scored_nll(theirs, chunk))
    ours_loss, theirs_loss = (float(np.mean(nll, dtype=np.float64)) for nll in (ours_nll, theirs_nll))
    return {
        "max_logprob_diff": largest,
        "ppl": float(np.exp(theirs_loss)),
        "ppl_pytorch": float(np.exp(ours_loss)),
        "ppl_rel_diff": abs(float(np.expm1(theirs_loss - ours_loss))),
    }


def compare_greedy(model: GPT, llama: LlamaCpp, chunks: Ids) -> dict[str, float]:
    """Let llama.cpp continue the beginnings of chunks, and see how likely each of its choices is here.

    The model reads llama.cpp's own continuation, so one different choice does not make all that follow different.
    A choice that is not the likeliest here has a gap to it, in nats; near zero it was a tie.
    """
    size = chunks.shape[1]
    n_new = min(N_NEW, size // 2)
    gaps: list[Floats] = []
    for chunk in chunks[:: max(1, len(chunks) // N_PROMPT)][:N_PROMPT]:
        prompt = chunk[: size - n_new].tolist()
        new = llama.greedy(prompt, n_new)
        ours = token_logprobs(model, np.array(prompt + new[:-1]))[len(prompt) - 1 :]  # (n_new, V)
        gaps.append(ours.max(-1) - ours[np.arange(n_new), new])
    return {"greedy_agreement": float(np.mean(np.array(gaps) == 0)), "max_greedy_gap": float(np.max(gaps))}


def log_softmax(logits: Floats) -> Floats:
    """(T, V) -> (T, V)"""
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def _rounded(value: float) -> float | None:
    """Four digits for the report, so that it does not change with the number of threads; None for NaN and infinity."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _texts(tokenizer: Tokenizer, ids: Ids) -> list[str]:
    """The documents in `ids`, and SAMPLES, without what only a newer Unicode knows.

    Python below 3.14 and llama.cpp read at most Unicode 15.1, the regex package reads later ones: there a letter of a
    newer script is a letter for one side only.
    """
    borders = np.flatnonzero(ids == tokenizer.eos_id)
    special = [*tokenizer.special_tokens.values()]
    documents: Sequence[str] = [tokenizer.decode(part[~np.isin(part, special)]) for part in np.split(ids, borders)]
    return ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in (*documents, *SAMPLES)]
