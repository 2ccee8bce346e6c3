"""What a user gives: prompts as arguments, from the standard input or a file of many, and lines that are typed."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinygpt.cli.flags import STDIN
from tinygpt.errors import UserError
from tinygpt.files import human_bytes, parse_json
from tinygpt.options import MOST_BYTES, checked
from tinygpt.params import require

MOST_LINES = 1000  # of the history
MARK = "> "


@dataclass(frozen=True)
class NamedPrompt:
    """A text to continue, and what messages call it."""

    text: str
    name: str  # "prompt", "prompt 2" or "prompts.txt:3"

    def named(self, problem: str) -> str:
        """A problem of the prompt with its name before it."""
        return problem if problem.startswith(self.name) else f"{self.name}: {problem}"


def check_prompts(args: Namespace) -> None:
    """Raises ParamsError where two sources are named, or one twice."""
    require(
        (args.prompt is None or args.prompts is None, "--prompt and --prompts contradict each other: give one"),
        ((args.prompt or []).count(STDIN) <= 1, f"--prompt {STDIN} is given twice: the standard input is read once"),
    )


def collect_prompts(args: Namespace) -> list[NamedPrompt]:
    """The prompts that the flags name.  Raises UserError with the place of what is not a prompt."""
    if args.prompts is None:
        texts = args.prompt or [""]
        names = ["prompt"] if len(texts) == 1 else [f"prompt {number}" for number in range(1, len(texts) + 1)]
        read = [read_input().removesuffix("\n") if text == STDIN else text for text in texts]  # that of `echo`
        return [NamedPrompt(checked(text), name) for text, name in zip(read, names, strict=True)]
    name = "standard input" if args.prompts == STDIN else args.prompts
    if args.prompts == STDIN:
        raw = read_some(standard_input(), name)
    elif not Path(args.prompts).exists():
        raise UserError(f"--prompts {args.prompts} not found: name a file with a prompt on each line")
    else:
        with open(args.prompts, "rb") as file:
            raw = read_some(file, name)
    lines = decode_utf8(raw, name).removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f'{name} has no prompts: write one a line, or {{"prompt": …}} in a .jsonl')
    return prompts_of(lines, name)


def read_input() -> str:
    """All of the standard input.  Raises UserError where it is not UTF-8."""
    return decode_utf8(read_some(standard_input(), "standard input"), "standard input")


def read_some(file: BinaryIO, name: str, *, line: bool = False) -> bytes:
    """All of a file, or a line.  Raises UserError where that is too much to be prompts."""
    raw = (file.readline if line else file.read)(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UserError(f"{name} has more than {human_bytes(MOST_BYTES)}: give it in parts")
    return raw


def standard_input() -> BinaryIO:
    """Its bytes; none where it is closed."""
    return sys.stdin.buffer if sys.stdin else io.BytesIO()


def prompts_of(lines: list[str], name: str) -> list[NamedPrompt]:
    """Prompts of a file's lines.  Raises ParamsError with all lines that are not prompts."""
    found: list[NamedPrompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        try:
            text = _prompt_of(line) if name.lower().endswith(".jsonl") else line.removesuffix("\r")
            found.append(NamedPrompt(checked(text), place))
        except UserError as error:
            problems.append(f"{place}: {error}")
    require(*((False, problem) for problem in problems))
    return found


def decode_utf8(raw: bytes, name: str, *, line: int = 1) -> str:
    """Bytes to text, without a byte order mark.  Raises UserError that names the line and the byte."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        place = f"{name}:{line + len(before) - 1}: byte {len(before[-1]) + 1}"
        raise UserError(f"{place} is 0x{raw[error.start]:02x}, which is not UTF-8: give it as UTF-8") from None


def _prompt_of(line: str) -> str:
    try:
        text = parse_json(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        shown = line if len(line) <= 40 else f"{line[:40]}…"
        raise UserError(f'{shown!r} is not {{"prompt": …}} with a text')
    return text


# ---- lines that are typed ----


def lines_of_chat() -> Iterator[str]:
    """Each line without its end, until the input ends.  Raises UserError where a file is not UTF-8."""
    if sys.stdin and sys.stdin.isatty():
        yield from _typed_lines()
        return
    lines = iter(lambda: read_some(standard_input(), "a line of the standard input", line=True), b"")
    for number, raw in enumerate(lines, start=1):
        yield decode_utf8(raw.rstrip(b"\r\n"), "standard input", line=number)


def history_file() -> Path:
    """Where typed lines are kept: tinygpt/history in the folder for state (XDG), which is ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()) / "tinygpt" / "history"


def _typed_lines() -> Iterator[str]:
    _open_history()
    while True:
        try:
            if not sys.stdout.isatty():  # the answers go into a file, and the mark need not
                print(MARK, end="", file=sys.stderr, flush=True)
            yield checked(input(MARK if sys.stdout.isatty() else ""))
        except EOFError:
            print(file=sys.stderr)
            return
        except (UnicodeDecodeError, UserError):
            print("error: that line was not UTF-8: set the terminal to it", file=sys.stderr)


def _open_history() -> None:
    """Typed lines can be edited, and come back next time.  Without readline, or a home, they just cannot."""
    try:
        import readline

        path = history_file()
    except (ImportError, RuntimeError):
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MOST_LINES)
    atexit.register(_keep_history, path)


def _keep_history(path: Path) -> None:
    import readline

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # what one types is private
        readline.write_history_file(path)
