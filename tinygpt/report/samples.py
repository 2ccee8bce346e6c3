"""What the model writes for each prompt, as a page to read."""

from __future__ import annotations

from pathlib import Path

from tinygpt.files import atomic_write
from tinygpt.generate import Sampling, generate
from tinygpt.model.gpt import GPT
from tinygpt.report.config import EvaluateParams
from tinygpt.tokenizer import Tokenizer


def write_samples(path: Path, model: GPT, tokenizer: Tokenizer, params: EvaluateParams) -> None:
    """Write one sample a prompt, as Markdown."""
    sampling = Sampling(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=params.seed)
    with atomic_write(path) as file:
        file.write("# Samples\n")
        for prompt in params.prompts:
            text = generate(model, tokenizer, prompt, max_new_tokens=params.max_new_tokens, sampling=sampling)
            file.write(f"\n## Prompt: {prompt or '(none)'}\n\n```text\n{prompt}{text}\n```\n")
