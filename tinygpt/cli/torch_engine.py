"""Our own GPT, from a folder of ours or of transformers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tinygpt.cli.engine import LOADABLE, must_be_there
from tinygpt.cli.sampling import Settings
from tinygpt.errors import UserError
from tinygpt.export.hf import read_hf
from tinygpt.files import read_json
from tinygpt.generate import Answer, Speculation, generate_batch
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.stream import begin, extend_by
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import quantize
from tinygpt.model.weights import CONFIG_FILE, WEIGHTS_FILE, fill, load_pair, unset_model
from tinygpt.params import ParamsError
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokenizer.tokenizer import TOKENIZER_FILE


class TorchEngine:
    """A model and its tokenizer."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        device: str = "cpu",
        quantized: str | None = None,
        compiled_rows: int = 0,
    ) -> None:
        """`compiled_rows` is the number of texts whose steps together are compiled; 0 compiles none.

        Raises UserError where the weights cannot be quantized so, or the step not be compiled.
        """
        self.model, self.vocabulary = model.to(device), tokenizer
        self.block_size = model.config.block_size
        self.speculation: Speculation | None = None  # with it, answers are extended one after the other
        if quantized:
            quantize(self.model, quantized)  # on the device: each has its own form
        if compiled_rows:
            compile_aloud(self.model, n_row=compiled_rows)

    def begin(self, prompt: str, settings: Settings, *, seed: int, n_logprobs: int | None = None) -> Answer:
        """An answer without a token.  Raises UserError where the prompt or the settings do not fit the model."""
        sampling = dataclasses.replace(settings.sampling, seed=seed)
        length = settings.length.max_new_tokens
        return begin(self.model, self.vocabulary, prompt, sampling, length, n_logprobs=n_logprobs)

    def extend(self, answers: Sequence[Answer], *, at_once: int) -> Iterator[list[Answer]]:
        """Extend each to its end, so many together; yields those that just got a token."""
        return extend_by(self.speculation, self.model, answers, at_once=at_once)

    def search(self, prompt: str, settings: Settings, *, n_logprobs: int | None = None) -> Answer:
        """The best of several texts."""
        (answer,) = generate_batch(
            self.model,
            self.vocabulary,
            [prompt],
            max_new_tokens=settings.length.max_new_tokens,
            sampling=settings.sampling,
            search=settings.search,
            n_logprobs=n_logprobs,
        )
        return answer


def compile_aloud(model: GPT, *, n_row: int = 1, room: int = 0) -> None:
    """Compile the steps of a model; a terminal is told why it waits.  Raises UserError where there is no compiler."""
    if sys.stderr.isatty():
        print("compiling (up to two minutes, some seconds from the second time on)", file=sys.stderr)
    compile_step(model, n_row=n_row, room=room)


def load_folder(folder: Path, tokenizer: Path | None) -> tuple[GPT, Tokenizer]:
    """Read a folder of ours, or of transformers where its config.json names a class of theirs.

    Raises UserError with what is wrong with it.
    """
    if not (must_be_there(folder, stage="train") / CONFIG_FILE).exists():
        found = sorted(folder.glob("*.gguf"))
        raise UserError(
            f"{folder} is no model: name {LOADABLE}, or a .gguf file{f', such as {found[0]}' if found else ''}"
        )
    if "model_type" in read_json(folder / CONFIG_FILE, stage="train"):
        if tokenizer is not None:
            raise ParamsError([f"--tokenizer={tokenizer} is for a model of ours: {folder} has its own"])
        return load_hf(folder)
    own = folder if (folder / TOKENIZER_FILE).exists() else folder.parent / "tokenizer"
    must_be_there(folder / WEIGHTS_FILE, stage="train")
    if tokenizer is not None:
        must_be_there(tokenizer, stage="train_tokenizer", wanted="a folder with tokenizer.json")
    return load_pair(folder, tokenizer or own)


def load_hf(folder: Path) -> tuple[GPT, Tokenizer]:
    """Read a folder of transformers.  Raises UserError with what is wrong with it."""
    config, tensors, tokenizer = read_hf_folder(folder)
    return fill(unset_model(config), tensors), tokenizer


def read_hf_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """The config, the tensors and the tokenizer of one.  Raises UserError with what is wrong with it."""
    config, tensors = read_hf(folder)
    if not (folder / TOKENIZER_FILE).exists():
        raise UserError(f"{folder / TOKENIZER_FILE} not found: only byte-level BPE in that form can be taken")
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the model has {config.vocab_size} tokens and its tokenizer.json {tokenizer.vocab_size}: "
            "name two that belong together"
        )
    return config, tensors, tokenizer
