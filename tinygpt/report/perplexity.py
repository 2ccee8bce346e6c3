"""Loss on held-out text, each token scored once, and the same by llama.cpp's protocol.

T tokens, V vocab_size; nll is the negative log-probability of a token, in nats.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tinygpt.model.gpt import GPT
from tinygpt.model.products import fast_products
from tinygpt.params import require
from tinygpt.progress import progress
from tinygpt.report.config import EvaluateParams
from tinygpt.tokens import TokenIds

BATCH_TOKENS = 8192  # tokens of one forward pass, at most
BATCH_LOGITS = 2**26  # and their logits, unless one window has more


def estimate(nll: NDArray[np.float64]) -> tuple[float, float]:
    """Mean nats per token, and its standard error, as if the tokens were independent."""
    return float(nll.mean()), float(nll.std() / math.sqrt(max(1, len(nll) - 1)))


def perplexity(loss: float) -> float:
    """e to the mean nats per token; infinite if that is more than a float holds."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def iter_windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, first scored, end) over tokens, so that each token but the first is scored exactly once.

    A window reads tokens[start:end - 1] and scores tokens[first:end], the first window up to `context` of them and
    the others up to `stride`: n_tokens = 7, context = 4, stride = 2 -> (0, 1, 5), (2, 5, 7).  All are equally long.
    """
    first = 1
    while first < n_tokens:
        end = min(first + (context if first == 1 else stride), n_tokens)
        yield max(0, end - 1 - context), first, end
        first = end


def token_nll(model: GPT, tokens: NDArray[np.integer], *, context: int, stride: int) -> NDArray[np.float64]:
    """Nats of every token but the first.  -> (len(tokens) - 1,)"""
    windows = [*iter_windows(len(tokens), context, stride)]
    device = next(model.parameters()).device
    per_batch = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // context)
    nll = np.empty(len(tokens) - 1)
    bar = progress("evaluate", total=len(nll), unit="tokens")
    with bar, fast_products(device), torch.inference_mode():
        for at in range(0, len(windows), per_batch):
            batch = windows[at : at + per_batch]
            ids = torch.from_numpy(np.stack([tokens[start:end] for start, _, end in batch]).astype(np.int64)).to(device)
            logits = model(ids[:, :-1]).float()  # (B, T, V)
            losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double().cpu().numpy()  # (B, T)
            for row, (start, first, end) in zip(losses, batch, strict=True):
                nll[first - 1 : end - 1] = row[first - start - 1 :]
                bar.update(end - first)
    return nll


def scored_nll(logprobs: NDArray[np.floating], ids: NDArray[np.integer]) -> NDArray[np.floating]:
    """Nats of the targets that llama-perplexity scores in one chunk: those in its second half.

    Each is predicted from at least half a chunk: ids 0 to 7 score the targets 5, 6 and 7.  (T, V), (T,) -> (T/2 - 1,)
    From tools/perplexity/perplexity.cpp of llama.cpp.
    """
    positions = np.arange(len(ids) // 2, len(ids) - 1)
    return -logprobs[positions, ids[positions + 1]]


def evaluate_model(model: GPT, tokens: TokenIds, params: EvaluateParams, *, n_bytes: int) -> dict[str, Any]:
    """The numbers of reports/eval.json: loss (nats per token), ppl, bpb, each with its standard error.

    `n_bytes` is the size of the text that the tokens stand for. The `<|endoftext|>` after each document is scored like
    any other token, so bpb pays for it. `llamacpp` holds the perplexity by llama.cpp's protocol.
    """
    context = params.context or model.config.block_size
    stride = params.stride or context
    no_text = f"the {params.split} split has no text, only {len(tokens)} tokens: choose another evaluate.split"
    require(*params.rules_with({"model": model.config}), (n_bytes > 0, no_text))
    nll = token_nll(model, tokens, context=context, stride=stride)
    is_shared = stride == context and len(tokens) % context > 0  # else the last window begins a token earlier
    loss, error = estimate(nll)
    bits = len(nll) / (n_bytes * math.log(2))  # bits per byte for each nat per token
    return {
        "split": params.split,
        "context": context,
        "stride": stride,
        "tokens": len(nll),
        "bytes": n_bytes,
        "loss": loss,
        "loss_error": error,
        "ppl": perplexity(loss),
        "ppl_error": perplexity(loss) * error,
        "bpb": loss * bits,
        "bpb_error": error * bits,
        "llamacpp": llamacpp_report(model, tokens, n_ctx=context, nll=nll if is_shared else None),
    }


def llamacpp_report(
    model: GPT, tokens: NDArray[np.integer], *, n_ctx: int, nll: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Perplexity as llama-perplexity computes it with `-c n_ctx`, or n_ctx alone if the text is too short.

    Its chunks do not overlap, and what is left at the end is dropped. `nll` is `token_nll` with windows that are these
    chunks, where the caller has it.
    """
    n = len(tokens) // n_ctx
    if not n or n_ctx < 4:
        return {"n_ctx": n_ctx}
    if nll is None:
        chunks = np.append(tokens[: n * n_ctx], tokens[:1])  # one more token, which is not scored: no window is moved
        nll = token_nll(model, chunks, context=n_ctx, stride=n_ctx)
    scored = nll[: n * n_ctx].reshape(n, n_ctx)[:, n_ctx // 2 : -1]  # see `scored_nll`
    loss, error = estimate(scored.ravel())
    return {"n_ctx": n_ctx, "tokens": scored.size, "ppl": perplexity(loss), "ppl_error": perplexity(loss) * error}


@torch.inference_mode()
def token_logprobs(model: GPT, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The model's log-probabilities after each token.  (T,) -> (T, V)"""
    device = model.tok_emb.weight.device
    with fast_products(device):
        logits = model(torch.from_numpy(ids)[None].to(device))[0]
    logprobs: NDArray[np.float32] = logits.float().log_softmax(-1).cpu().numpy()
    return logprobs
