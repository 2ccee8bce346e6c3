"""The prompts of a command: an argument, the standard input, or a file of many."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinygpt.errors import UserError
from tinygpt.generate.answer import checked
from tinygpt.params import ParamsError, require

STDIN = "-"
MOST_SHOWN = 10  # problems that are told at once


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and where it stands."""

    text: str
    place: str  # for messages: "prompt", "prompt 2" or "prompts.txt:3"

    def named(self, problem: str) -> str:
        """A problem of the prompt with its place before it."""
        return problem if problem.startswith(self.place) else f"{self.place}: {problem}"


def add_prompt_options(command: argparse.ArgumentParser) -> None:
    """Where prompts come from."""
    command.add_argument(
        "--prompt",
        action="append",
        help=f"text to continue, once or more; {STDIN} = all of the standard input; without it a new document begins",
    )
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help=f'many: one a line, or in a .jsonl {{"prompt": …}} a line; {STDIN} = the lines of the standard input',
    )


def check_prompts(args: argparse.Namespace) -> None:
    """Raises ParamsError where two sources are named, or one twice."""
    require(
        (args.prompt is None or args.prompts is None, "--prompt and --prompts contradict each other: give one"),
        ((args.prompt or []).count(STDIN) <= 1, f"--prompt {STDIN} is there twice: the standard input is read once"),
    )


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Raises UserError with the place of what is no prompt."""
    if args.prompts is None:
        texts = args.prompt or [""]
        places = ["prompt"] if len(texts) == 1 else [f"prompt {number}" for number in range(1, len(texts) + 1)]
        read = [_read_stdin() if text == STDIN else text for text in texts]
        return [Prompt(checked(text), place) for text, place in zip(read, places, strict=True)]
    name = "standard input" if args.prompts == STDIN else args.prompts
    if args.prompts == STDIN:
        raw = standard_input().read()
    elif not Path(args.prompts).exists():
        raise UserError(f"--prompts {args.prompts} not found: name a file with a prompt on each line")
    else:
        raw = Path(args.prompts).read_bytes()
    lines = decode_utf8(raw, name).removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f'{name} has no prompts: write one a line, or {{"prompt": …}} in a .jsonl')
    return read_lines(lines, name)


def _read_stdin() -> str:
    return decode_utf8(standard_input().read(), "standard input").removesuffix("\n")  # that of `echo`


def standard_input() -> BinaryIO:
    """Its bytes; none where it is closed."""
    return sys.stdin.buffer if sys.stdin else io.BytesIO()


def read_lines(lines: list[str], name: str) -> list[Prompt]:
    """Prompts of a file's lines.  Raises ParamsError with all lines that are none."""
    found: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        try:
            text = _prompt_of(line) if name.endswith(".jsonl") else line.removesuffix("\r")
            found.append(Prompt(checked(text), place))
        except UserError as error:
            problems.append(f"{place}: {error}")
    raise_some(problems)
    return found


def raise_some(problems: list[str]) -> None:
    """Raise ParamsError with the first of many problems."""
    more = len(problems) - MOST_SHOWN
    if problems:
        raise ParamsError(problems[:MOST_SHOWN] + ([f"and {more:,} more"] if more > 0 else []))


def decode_utf8(raw: bytes, name: str, *, line: int = 1) -> str:
    """Bytes to text, without a byte order mark.  Raises UserError that names the line and the byte that is none."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        place = f"{name}:{line + len(before) - 1}: byte {len(before[-1]) + 1}"
        raise UserError(f"{place} is 0x{raw[error.start]:02x}, which is no UTF-8: give it as UTF-8") from None


def _prompt_of(line: str) -> str:
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        shown = line if len(line) <= 40 else f"{line[:40]}…"
        raise UserError(f'{shown!r} is no {{"prompt": …}} with a text')
    return text
