"""What is said of an exported model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tinygpt.export.gguf import GGUFFile
from tinygpt.files import human_bytes


def gguf_entry(made: GGUFFile, n_bytes: int, measures: Mapping[str, float | None]) -> dict[str, Any]:
    """The entry of a GGUF file in reports/export.json."""
    return {
        "family": made.family,
        "context": made.n_ctx,
        "bytes": n_bytes,
        "bits_per_weight": round(made.bits_per_weight, 3),
        **measures,
        "tensors": dict(Counter(made.types.values())),
    }


def remarks(entry: Mapping[str, Any], block_size: int) -> str:
    """One line from its entry in reports/export.json: size, family, types, perplexity, and what it has lost."""
    said = [human_bytes(entry["bytes"]), entry["family"]]
    if "tensors" in entry:
        types = ", ".join(f"{n} {kind}" for kind, n in entry["tensors"].items())
        said.append(f"{entry['bits_per_weight']:.2f} bits a weight ({types})")
        said.append(f"perplexity {entry['ppl']:.2f} in llama.cpp and {entry['ppl_pytorch']:.2f} in PyTorch")
    if entry["context"] < block_size:
        said.append(
            f"A CONTEXT OF {entry['context']} TOKENS, NOT {block_size}: {entry['family']} knows no such window, "
            "and with more tokens computes something else"
        )
    return ", ".join(said)
