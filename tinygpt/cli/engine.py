"""What computes a text, chosen by what lies at --model: our own GPT, or llama.cpp on a GGUF file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tinygpt.cli.sampling import Settings, flag
from tinygpt.device import find_device
from tinygpt.errors import UserError
from tinygpt.files import must_exist
from tinygpt.generate import Answer
from tinygpt.generate.answer import Vocabulary
from tinygpt.model.quantize import QUANTIZED
from tinygpt.params import require

MODEL = Path("data/model")
GGUF = Path("data/export/gguf/tinygpt-f32.gguf")
LOADABLE = "a folder with config.json and model.safetensors, of ours or of transformers"
# What llama.cpp cannot do here, by option, and what can be done instead.
NOT_IN_LLAMA_CPP = {
    "tokenizer": "a .gguf file has its own",
    "device": "it computes on the CPU here",
    "quantize": "name a .gguf file of smaller weights",
    "compile": "it is machine code already",
    "n_beam": "searches are of --engine tinygpt",
    "best_of": "searches are of --engine tinygpt",
}
UNCHANGED = (None, "auto", "cpu", 1, False)  # but True, which is 1 for Python, is a flag that was given


class Engine(Protocol):
    """What computes texts."""

    block_size: int  # tokens of context

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""

    def begin(self, prompt: str, settings: Settings, *, seed: int, n_logprobs: int | None = None) -> Answer:
        """An answer without a token.  Raises UserError where the prompt or the settings do not fit the model."""

    def extend(self, answers: Sequence[Answer], *, at_once: int) -> Iterator[list[Answer]]:
        """Extend each to its end, so many together; yields those that just got a token."""

    def search(self, prompt: str, settings: Settings, *, n_logprobs: int | None = None) -> Answer:
        """The best of several texts."""


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """Which model, and what computes it."""
    command.add_argument(
        "--model", type=Path, help=f"a folder of ours or of transformers, or a .gguf file (default: {MODEL})"
    )
    command.add_argument(
        "--tokenizer", type=Path, help="folder, for a model of ours (default: the model's, or `tokenizer` beside it)"
    )
    command.add_argument(
        "--engine", choices=["auto", "tinygpt", "llama.cpp"], default="auto", help="auto: llama.cpp for a .gguf file"
    )
    add_device_options(command)


def add_device_options(command: argparse.ArgumentParser) -> None:
    """Where and with what weights tinygpt's engine computes."""
    command.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], help="of tinygpt's engine (default: auto)")
    command.add_argument(
        "--quantize", choices=list(QUANTIZED), help="weights of one byte or half of one: less memory, faster"
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the steps, with --draft the draft's: up to two minutes at first, seconds the next time; then "
        "one text is 1.5 to 3 times as fast, several together take a seventh less time",
    )


def check_engine(args: argparse.Namespace) -> None:
    """Raises ParamsError with all options that the engine cannot follow."""
    path = model_path(args)
    if is_gguf(path):
        options = {name: getattr(args, name) for name in NOT_IN_LLAMA_CPP}
        refused = {name: value for name, value in options.items() if value is True or value not in UNCHANGED}
        require(
            (
                args.engine != "tinygpt",
                f"--engine=tinygpt does not read {path}: it takes folders, llama.cpp .gguf files",
            ),
            *(
                (False, f"{given(name, value)} cannot be had with llama.cpp: {NOT_IN_LLAMA_CPP[name]}")
                for name, value in refused.items()
            ),
        )
    else:
        require((args.engine != "llama.cpp", f"--engine=llama.cpp reads .gguf files, and {path} is none: try {GGUF}"))
        find_device(args.device or "auto", "--device")


def given(name: str, value: object) -> str:
    """An option as the user wrote it."""
    return flag(name) if value is True else f"{flag(name)}={value}"


def open_engine(args: argparse.Namespace, *, n_row: int = 1) -> Engine:
    """The engine of the options, for so many texts together.

    Raises UserError with what is wrong with the model's files.
    """
    path = model_path(args)
    if is_gguf(path):
        from tinygpt.cli.llama_engine import LlamaEngine  # each imports what the other can do without

        return LlamaEngine(must_be_there(path, stage="export"))
    from tinygpt.cli.torch_engine import TorchEngine, load_folder

    model, tokenizer = load_folder(path, args.tokenizer)
    device = find_device(args.device or "auto")
    speculates = getattr(args, "draft", None) is not None or getattr(args, "prompt_lookup", False)
    compiled_rows = n_row if args.compile and not speculates else 0  # else once it is known whose, with how much room
    return TorchEngine(model, tokenizer, device=device, quantized=args.quantize, compiled_rows=compiled_rows)


def must_be_there(path: Path, *, stage: str, wanted: str = LOADABLE) -> Path:
    """The path.  Raises UserError where nothing is; only what stands in data/ is made by a stage."""
    if path.parts[:1] == MODEL.parts[:1]:
        return must_exist(path, stage=stage)
    if not path.exists():
        raise UserError(f"{path} not found: name {'a .gguf file' if is_gguf(path) else wanted}")
    return path


def model_path(args: argparse.Namespace) -> Path:
    """Where the model is."""
    path: Path | None = args.model
    return path or (GGUF if args.engine == "llama.cpp" else MODEL)


def is_gguf(path: Path) -> bool:
    """Whether a file is one of GGUF, by its name or its first bytes."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
