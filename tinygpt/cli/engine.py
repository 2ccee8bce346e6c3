"""The engine that computes a text: our own GPT, or llama.cpp if --model is a GGUF file.

From llama.cpp come the tokenizer and the logits. The same code then chooses a token, so all options mean the same.
"""

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tinygpt.cli.flags import GGUF, DeviceOptions, EngineOptions, ProposalOptions, flag, read
from tinygpt.errors import UserError
from tinygpt.export.folders import must_be_there, open_model
from tinygpt.export.llamacpp import LlamaCpp, open_gguf
from tinygpt.generate import Answer, Search, Speculation
from tinygpt.generate.answer import Vocabulary, choose_rows, keep_logprobs
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.decoder import slide
from tinygpt.generate.stream import extend
from tinygpt.model.gpt import GPT
from tinygpt.model.quantize import quantize
from tinygpt.options import Settings
from tinygpt.params import require
from tinygpt.runtime import find_device
from tinygpt.tokenizer import Tokenizer

MOST_CONTEXT = 8192  # tokens: at the full context of a large model, keys and values would not fit in memory
NOT_IN_LLAMA_CPP = ("tokenizer", "device", "quantize", "compile", "n_beam", "best_of", "draft", "prompt_lookup")
UNCHANGED = (None, "auto", "cpu", 1)  # values with which these options change nothing


@dataclass(frozen=True)
class Engine:
    """Computes texts; `ends` are tokens that end one, besides the vocabulary's own."""

    vocabulary: Vocabulary
    block_size: int
    extend: Callable[..., Iterator[list[Answer]]]  # like extend() of stream.py, without its argument `model`
    ends: tuple[int, ...] = ()

    def begin(self, prompt: str, settings: Settings, *, seed: int, n_logprobs: int | None = None) -> Answer:
        """An answer that has no token yet.  Raises UserError if the prompt or the settings do not fit the model."""
        stop_ids = (*settings.stop_ids, *self.ends)
        banned_ids = (*settings.banned_ids, *(self.ends if settings.ignore_eos else ()))
        sampling = dataclasses.replace(settings, seed=seed, stop_ids=stop_ids, banned_ids=banned_ids)
        most, size = settings.max_new_tokens, self.block_size
        return Answer(prompt, self.vocabulary, sampling, max_new_tokens=most, block_size=size, n_logprobs=n_logprobs)


def torch_engine(model: GPT, tokenizer: Tokenizer, speculation: Speculation | None = None) -> Engine:
    """An engine of our own model; with speculation, it extends answers one after the other."""
    return Engine(tokenizer, model.config.block_size, partial(extend, model, speculation=speculation))


def llama_engine(path: Path) -> Engine:
    """An engine that runs a GGUF file in llama.cpp.

    Raises UserError, with llama.cpp's reason, if it cannot load the file, or if no token ends a text.
    """
    llama = open_gguf(path, n_ctx=MOST_CONTEXT, n_threads=torch.get_num_threads())
    if llama.eos_id < 0:
        llama.close()
        raise UserError(f"{path} has no token that ends a text: convert the model again, with its tokenizer")
    ends = tuple(llama.eog_ids())  # all tokens at which llama.cpp ends a text
    return Engine(llama, llama.n_ctx, partial(extend_in_llama, llama), ends)


def extend_in_llama(
    llama: LlamaCpp, answers: Sequence[Answer], *, at_once: int, search: Search
) -> Iterator[list[Answer]]:
    """Extend each answer to its end, one after the other; yields the one that just got a token.

    Raises ParamsError for a search, which would need several answers side by side.
    """
    require((search.n_row == 1, "n_beam and best_of are not available with llama.cpp: leave them out"))
    for answer in answers:
        seen = answer.prompt[-llama.n_ctx :]
        logits = llama.read(seen)
        while True:
            rows = torch.from_numpy(logits)[None]
            (chosen,) = choose_rows(rows, [answer])
            keep_logprobs(rows, [answer], [chosen])
            answer.add(chosen)
            yield [answer]
            if answer.finish_reason:
                break
            seen.append(answer.ids[-1])
            is_new = slide(seen, llama.n_ctx)
            logits = llama.read(seen) if is_new else llama.append(seen[-1])


# ---- from flags to an engine ----


def read_engine(args: Namespace) -> EngineOptions:
    """The options of the engine.  Raises ParamsError with all options that it does not support."""
    options = read(EngineOptions, args)
    path, engine = options.path, options.engine
    if not is_gguf(path):
        require((engine != "llama.cpp", f"--engine=llama.cpp reads .gguf files, and {path} is not one: try {GGUF}"))
        find_device(options.device, "--device")
        return options
    asked = {name: getattr(args, name, None) for name in NOT_IN_LLAMA_CPP}  # chat has no flags for proposals
    refused = [name for name, value in asked.items() if value is True or value not in UNCHANGED]
    require(
        (engine != "tinygpt", f"--engine=tinygpt does not read {path}: it reads folders; llama.cpp reads .gguf files"),
        *((False, f"{flag(name)} is not available with llama.cpp: leave it out") for name in refused),
    )
    return options


def open_engine(options: EngineOptions, proposals: ProposalOptions | None = None, *, n_row: int = 1) -> Engine:
    """The engine that the options ask for, for n_row texts together.

    Raises UserError with what is wrong with the files of the model, or of its draft.
    """
    if is_gguf(options.path):
        return llama_engine(must_be_there(options.path, "a .gguf file"))
    model, tokenizer = open_model(options.path, options.tokenizer)
    place(model, options)
    if proposals is None or not proposals.flag:
        compile_if_asked(model, options, n_row=n_row)
        return torch_engine(model, tokenizer)
    draft = None
    if proposals.draft:
        draft, other = open_model(proposals.draft, options.tokenizer)
        if other.tokens != tokenizer.tokens:
            problem = "has different tokens from the model's: use a draft trained with its tokenizer"
            raise UserError(f"--draft={proposals.draft} {problem}")
        draft.to(find_device(options.device))
    compile_if_asked(draft or model, options, room=proposals.n_draft)
    return torch_engine(model, tokenizer, Speculation(draft=draft, n_draft=proposals.n_draft, ngram=proposals.ngram))


def place(model: GPT, options: DeviceOptions) -> None:
    """Move a model to its device and quantize it there.  Raises UserError if its weights cannot be quantized so."""
    model.to(find_device(options.device))
    if options.quantize:
        quantize(model, options.quantize)  # on the device, as the format depends on it


def compile_if_asked(model: GPT, options: DeviceOptions, *, n_row: int = 1, room: int = 0) -> None:
    """Compile the steps of a model, for n_row rows, and room for as many tokens to take back.

    In a terminal, print why the user has to wait. Raises UserError if there is no compiler.
    """
    if options.compile:
        if sys.stderr.isatty():
            print("compiling (up to two minutes the first time, then seconds)", file=sys.stderr)
        compile_step(model, n_row=n_row, room=room)


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name or its first bytes."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
