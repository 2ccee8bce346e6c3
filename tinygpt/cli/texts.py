"""`python -m tinygpt encode`, `decode`, `tokenizer-report`, `attention`: a text as the tokenizer and the model see it.

The prompts of `generate` are read here, too. Imports that take long are in functions, so that `encode` answers at once.
"""

import codecs
import io
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinygpt.cli.flags import STDIN
from tinygpt.errors import UserError, printable, shown
from tinygpt.files import atomic_write, human_bytes, parse_json
from tinygpt.options import MOST_BYTES, checked
from tinygpt.params import ParamsError, require
from tinygpt.tokenizer import load_tokenizer

N_LONGEST = 12


def encode(args: Namespace) -> None:
    """Print ids, and pieces between bars.  A space is a middle dot, a byte of half a character by its number."""
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(read_input() if args.text is None else checked(args.text))
    print(*ids)
    if not args.ids:
        print("".join(f"|{visible(tokenizer.decode_bytes([i]))}" for i in ids) + "|")
        print(f"{len(ids):,} tokens, {len(tokenizer.decode_bytes(ids)):,} bytes")


def decode(args: Namespace) -> None:
    """Print the text of ids, byte for byte."""
    words = [word for arg in args.ids or [read_input()] for word in arg.replace(",", " ").split()]
    if odd := [word for word in words if not word.isdecimal() or len(word) > 18]:
        raise UserError(f"{shown(odd[0])} is not an id: give whole numbers, such as `decode 72 101`")
    try:
        raw = load_tokenizer(args.tokenizer).decode_bytes(map(int, words))
    except ValueError as error:
        raise UserError(str(error)) from None
    sys.stdout.buffer.write(raw)


def tokenizer_report(args: Namespace) -> None:
    """Print the table and the longest tokens, and write the plot."""
    from tinygpt.corpus.folders import SPLITS, split_file
    from tinygpt.report.plots import plot_fit
    from tinygpt.report.tokenizer import fit_file, fit_table, longest_tokens

    paths = [args.tokenizer, *([args.against] if args.against else [])]
    tokenizers = {str(path): load_tokenizer(path) for path in paths}
    files = {split: split_file(args.text, split) for split in SPLITS}
    fits = {(name, split): fit_file(tokenizers[name], files[split]) for name in tokenizers for split in files}
    table = fit_table(fits)
    if table.empty:
        raise UserError(f"{args.text} holds no text: run `dvc repro clean`")
    print(table.to_string(index=False))
    for name, tokenizer in tokenizers.items():
        print(f"\nlongest of {name}: " + "  ".join(visible(raw) for raw in longest_tokens(tokenizer, N_LONGEST)))
    plot_fit({name: (tokenizer, fits[name, "train"]) for name, tokenizer in tokenizers.items()}, args.plot)
    print(f"\n{args.plot} shows how often and how long tokens are")


def attention(args: Namespace) -> None:
    """Draw what each head of the model attends to, as a picture and a page."""
    from tinygpt.export.folders import open_model
    from tinygpt.generate import Sampling, generate_batch
    from tinygpt.generate.answer import prompt_ids
    from tinygpt.model.inside import attention_maps
    from tinygpt.report.page import attention_page
    from tinygpt.report.plots import plot_attention

    model, tokenizer = open_model(args.model, args.tokenizer)
    ids, n_new = prompt_ids(tokenizer, checked(args.prompt)), args.generate
    if len(ids) + n_new > model.config.block_size:
        more, n = f" with --generate={n_new}" if n_new else "", len(ids) + n_new
        raise UserError(
            f"--prompt{more} has {n} tokens, but the model reads only {model.config.block_size}: shorten it"
        )
    if n_new:
        likeliest = Sampling(temperature=0)
        ids += generate_batch(model, tokenizer, [args.prompt], max_new_tokens=n_new, sampling=likeliest)[0].ids
    tokens = [visible(tokenizer.decode_bytes([i])) for i in ids]
    maps = attention_maps(model, ids)
    page = args.plot.with_suffix(".html")
    with atomic_write(page) as file:  # both files or, on a full disk, none
        file.write(attention_page(maps, tokens))
        file.flush()
        plot_attention(maps, tokens, args.plot)
    n_layer, n_head = maps.shape[:2]
    print(f"{args.plot} has all {n_layer * n_head} heads, {page} shows one after the other")


def visible(raw: bytes) -> str:
    r"""Bytes as visible text: b" a\n\xe4" -> "·a\\n\\xe4"."""
    return printable(raw.decode("utf-8", errors="backslashreplace").replace(" ", "·"))


# ---- reading texts ----


@dataclass(frozen=True)
class NamedPrompt:
    """A text to continue, and its name in messages."""

    text: str
    name: str  # "prompt", "prompt 2" or "prompts.txt:3"

    def named(self, problem: str) -> str:
        """A problem, with the prompt's name before it."""
        return problem if problem.startswith(self.name) else f"{self.name}: {problem}"


def check_prompts(args: Namespace) -> None:
    """Raises ParamsError if two sources of prompts are given, or standard input twice."""
    require(
        (args.prompt is None or args.prompts is None, "--prompt and --prompts cannot be combined: give one of them"),
        ((args.prompt or []).count(STDIN) <= 1, f"--prompt {STDIN} is given twice: standard input is read only once"),
    )


def collect_prompts(args: Namespace) -> list[NamedPrompt]:
    """The prompts that the flags ask for.  Raises UserError with the place of anything that is not a prompt."""
    if args.prompts is None:
        texts = args.prompt or [""]
        names = ["prompt"] if len(texts) == 1 else [f"prompt {number}" for number in range(1, len(texts) + 1)]
        read = [read_input().removesuffix("\n") if text == STDIN else text for text in texts]  # `echo` adds it
        return [NamedPrompt(checked(text), name) for text, name in zip(read, names, strict=True)]
    if args.prompts == STDIN:
        name, text = "standard input", read_input()
    else:
        path, how = Path(args.prompts), "give a file with a prompt in each line"  # or a pipe
        require((path.exists() and not path.is_dir(), f"--prompts {shown(args.prompts)} is not a file: {how}"))
        with path.open("rb") as file:
            name, text = args.prompts, decode_utf8(read_some(file, args.prompts), args.prompts)
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f'{name} has no prompts: write one per line, or {{"prompt": …}} in a .jsonl')
    return prompts_of(lines, name)


def read_input() -> str:
    """All of standard input.  Raises UserError if it is not UTF-8."""
    return decode_utf8(read_some(standard_input(), "standard input"), "standard input")


def read_some(file: BinaryIO, name: str, *, line: bool = False) -> bytes:
    """All of a file, or a line of it.  Raises UserError if it has more than MOST_BYTES."""
    raw = (file.readline if line else file.read)(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UserError(f"{name} has more than {human_bytes(MOST_BYTES)}: split it")
    return raw


def standard_input() -> BinaryIO:
    """Standard input as a file of bytes, which is empty if it is closed."""
    return sys.stdin.buffer if sys.stdin else io.BytesIO()


def prompts_of(lines: list[str], name: str) -> list[NamedPrompt]:
    """The prompts in a file's lines.  Raises ParamsError with all lines that are not prompts."""
    found: list[NamedPrompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        try:
            text = _prompt_of(line) if name.lower().endswith(".jsonl") else line.removesuffix("\r")
            found.append(NamedPrompt(checked(text), place))
        except UserError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ParamsError(problems)
    return found


def decode_utf8(raw: bytes, name: str, *, line: int = 1) -> str:
    """Bytes to text, without a byte order mark.  Raises UserError with the line and byte of what is not UTF-8."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        place = f"{name}:{line + len(before) - 1}: byte {len(before[-1]) + 1}"
        raise UserError(f"{place} is 0x{raw[error.start]:02x}, which is not UTF-8: convert it to UTF-8") from None


def _prompt_of(line: str) -> str:
    with suppress(ValueError, LookupError, TypeError):
        if isinstance(text := parse_json(line)["prompt"], str):
            return text
    raise UserError(f'must be {{"prompt": …}} with a text, found {line[:40] or "nothing"}')
