"""Run an exported file in real llama.cpp and compare it with the model: tokens, probabilities, perplexity, choices.

T tokens, V vocab_size. Log-probabilities are natural, ids are (T,) int64.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tinygpt.errors import UserError
from tinygpt.export.config import GGUFType
from tinygpt.export.gguf import read_gguf
from tinygpt.export.gguf_types import tolerance
from tinygpt.export.llamacpp import LlamaCpp, open_gguf
from tinygpt.model.gpt import GPT
from tinygpt.report.perplexity import llamacpp_report, perplexity, scored_nll, token_logprobs
from tinygpt.tokenizer import Tokenizer

Ids = NDArray[np.integer]

CHUNK_SIZE = 512  # llama-perplexity's default context
N_PROMPT, N_NEW = 8, 32  # greedy continuations: how many, and tokens in each
SMALL = 1e-4  # weights that are smaller, on average, count as this large: scales are float16, which ends at 6e-8

# Texts on which tokenizers often disagree, checked with any corpus.
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


def check_gguf(
    model: GPT, tokenizer: Tokenizer, path: Path, weight_type: GGUFType, ids: Ids
) -> tuple[dict[str, float | None], list[str]]:
    """Compare one file with the model on SAMPLES and held-out `ids`, at least a context or CHUNK_SIZE of them.

    Returns the measures for the report, and a message for each that is out of tolerance, naming the file.
    Raises UserError if llama.cpp does not load the file.
    """
    most = tolerance(model.config.mlp, weight_type)
    written = read_gguf(path, model.config)
    size = min(CHUNK_SIZE, written.config.block_size)
    chunks = ids[: len(ids) // size * size].reshape(-1, size).astype(np.int64)
    with open_gguf(path, n_ctx=size, n_threads=torch.get_num_threads()) as llama:
        measures = {
            "wrong_tokens": count_wrong_tokens(tokenizer, llama, _texts(tokenizer, ids)),
            "max_weight_error": compare_weights(model, written),
            **compare_logprobs(written, llama, chunks),
            **compare_greedy(written, llama, chunks),
        }
    measures["ppl_pytorch"] = llamacpp_report(model, chunks.reshape(-1), n_ctx=size)["ppl"]
    if not math.isfinite(measures["ppl_pytorch"]):
        raise UserError("the perplexity of the model overflows: lower train.lr and train again")
    measures["ppl_increase"] = measures["ppl"] / measures["ppl_pytorch"] - 1
    allowed = {
        "wrong_tokens": 0,
        "max_weight_error": most.weight,
        "max_logprob_diff": most.logprob,
        "ppl_rel_diff": most.ppl,
        # two log-probabilities may be off, each by the tolerance, before another token comes out on top
        "max_greedy_gap": 2 * most.logprob,
    }
    failures = [
        f"{path.name}: {name} is {measures[name]:.3g} in llama.cpp, the limit is {limit:.3g}"
        for name, limit in allowed.items()
        if not measures[name] <= limit  # NaN fails too
    ]
    return {name: _rounded(value) for name, value in measures.items()}, failures


def compare_weights(model: GPT, written: GPT) -> float:
    """The largest relative error of a tensor in the file; positions that the file leaves out do not count."""
    ours, theirs = model.state_dict(), written.state_dict()
    pairs = [(tensor[: len(theirs[name])].cpu(), theirs[name]) for name, tensor in ours.items()]
    return max(float((a - b).norm()) / max(float(a.norm()), SMALL * a.numel() ** 0.5) for a, b in pairs)


def count_wrong_tokens(tokenizer: Tokenizer, llama: LlamaCpp, texts: Iterable[str]) -> int:
    """How many texts get other ids in llama.cpp, plus how many ids have other bytes or end a text wrongly there."""
    wrong_texts = sum(llama.encode(text) != tokenizer.encode(text) for text in texts)
    wrong_pieces = sum(llama.decode_bytes([id]) != tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size))
    eog_ids = set(llama.eog_ids())
    wrong_ends = len(eog_ids - set(tokenizer.special_tokens.values())) + (tokenizer.eos_id not in eog_ids)
    return wrong_texts + wrong_pieces + wrong_ends


def compare_logprobs(model: GPT, llama: LlamaCpp, chunks: Ids) -> dict[str, float]:
    """Compare log-probabilities at every position of (N, T) chunks, and perplexity by llama-perplexity's protocol."""
    largest, ours_nll, theirs_nll = 0.0, [], []
    for chunk in chunks:
        ours = token_logprobs(model, chunk)
        theirs = torch.from_numpy(llama.logits(chunk.tolist())).log_softmax(-1).numpy()
        largest = max(largest, float(np.abs(ours - theirs).max()))
        ours_nll.append(scored_nll(ours, chunk))
        theirs_nll.append(scored_nll(theirs, chunk))
    ours_loss, theirs_loss = (float(np.mean(nll, dtype=np.float64)) for nll in (ours_nll, theirs_nll))
    return {
        "max_logprob_diff": largest,
        "ppl": perplexity(theirs_loss),
        "ppl_rel_diff": abs(float(np.expm1(theirs_loss - ours_loss))),
    }


def compare_greedy(model: GPT, llama: LlamaCpp, chunks: Ids) -> dict[str, float]:
    """Let llama.cpp continue the beginnings of chunks, and see how likely each of its choices is for our model.

    Our model reads llama.cpp's own continuation, so one different choice does not change all that follow. The gap is
    how much less likely a choice is than our likeliest, in nats; near zero it was a tie.
    """
    size = chunks.shape[1]
    n_new = min(N_NEW, size // 2)
    gaps: list[NDArray[np.float32]] = []
    for chunk in chunks[:: max(1, len(chunks) // N_PROMPT)][:N_PROMPT]:
        prompt = chunk[: size - n_new].tolist()
        new = llama.greedy(prompt, n_new)
        ours = token_logprobs(model, np.array(prompt + new[:-1]))[len(prompt) - 1 :]  # (n_new, V)
        gaps.append(ours.max(-1) - ours[np.arange(n_new), new])
    return {"greedy_agreement": float(np.mean(np.array(gaps) == 0)), "max_greedy_gap": float(np.max(gaps))}


def _rounded(value: float) -> float | None:
    """Four digits for the report, so that it does not change with the number of threads; None for NaN and infinity."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _texts(tokenizer: Tokenizer, ids: Ids) -> list[str]:
    """The documents in `ids`, and SAMPLES, without characters that Python's Unicode does not have yet.

    Python below 3.14 and llama.cpp know Unicode 15.1 at most, the regex package later versions: a letter of a newer
    script is a letter for only one of the two sides.
    """
    borders = np.flatnonzero(ids == tokenizer.eos_id)
    special = [*tokenizer.special_tokens.values()]
    documents: Sequence[str] = [tokenizer.decode(part[~np.isin(part, special)]) for part in np.split(ids, borders)]
    return ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in (*documents, *SAMPLES)]
