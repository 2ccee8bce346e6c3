"""What the model writes for each prompt, as a page to read."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tinygpt.errors import printable
from tinygpt.files import atomic_write, fenced
from tinygpt.generate import Sampling, generate
from tinygpt.model.gpt import GPT
from tinygpt.report.config import EvaluateParams
from tinygpt.tokenizer import Tokenizer


def write_samples(path: Path, model: GPT, tokenizer: Tokenizer, params: EvaluateParams) -> None:
    """Write one sample a prompt, as Markdown."""
    sampling = sampling_of(params)
    with atomic_write(path) as file:
        file.write("# Samples\n")
        for prompt in params.prompts:
            text = generate(model, tokenizer, prompt, max_new_tokens=params.max_new_tokens, sampling=sampling)
            heading = re.sub(r"([\\`*_<\[])", r"\\\1", printable(prompt)) or "(none)"  # of one line, and only text
            file.write(f"\n## Prompt: {heading}\n\n{fenced(f'{prompt}{text}')}")


def sampling_of(params: EvaluateParams) -> Sampling:
    """The options of `Sampling` that the params have; all others keep their default."""
    shared = {field.name for field in fields(Sampling)} & {field.name for field in fields(params)}
    return Sampling(**{name: getattr(params, name) for name in shared})
