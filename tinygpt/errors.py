"""Mistakes a user can make, and how a program reports them: one line each, no traceback."""

import errno
import functools
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path, PurePath
from typing import ParamSpec

P = ParamSpec("P")

NO_MEMORY = re.compile("can't allocate memory|(CUDA|MPS).{,20}out of memory|CUBLAS_STATUS_ALLOC_FAILED")
BREAK = "\n       "  # between two problems of one error
WORD = re.compile(r"(?!(?i:null|true|false)$)[^\W\d][\w.-]*")  # a text that needs no quotes
MOST_PROBLEMS = 20  # that one error lists
MOST_CHARACTERS = 1000  # of each


def printable(text: object) -> str:
    r"""A text as one line that a terminal prints without obeying it: "a\x1b[2J" -> "a\\x1b[2J".

    A long one loses its middle. Whatever comes from a file, its name included, is printed through this.
    """
    text = str(text)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS * 2 // 3]} … {text[-MOST_CHARACTERS // 3 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value on one line, as one would write it in YAML; a text that is not a plain word is quoted as in JSON."""
    if isinstance(value, float | date) or (isinstance(value, str) and WORD.fullmatch(value)):
        return str(value)
    return printable(json.dumps(value, ensure_ascii=False, skipkeys=True, default=_kind))


def _kind(value: object) -> str:
    return str(value) if isinstance(value, date | PurePath) else f"<{type(value).__name__}>"


class UserError(Exception):
    """Something the user can fix: the message names the key, file or stage and says what to do."""

    def __str__(self) -> str:
        problems = self.args[0] if self.args and isinstance(self.args[0], list) else self.args
        lines = [line for problem in problems for line in str(problem).split(BREAK)]
        more = [f"and {len(lines) - MOST_PROBLEMS:,} more"] if len(lines) > MOST_PROBLEMS else []
        return BREAK.join([*map(printable, lines[:MOST_PROBLEMS]), *more])


class Stopped(Exception):
    """The program was asked to stop and has saved its state; `signal` is the number of the signal that asked."""

    def __init__(self, signal: int, message: str) -> None:
        self.signal = signal
        super().__init__(message)


def nowhere() -> io.TextIOWrapper:
    """A stream for texts and bytes that nobody reads."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def program(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a program's `main`: errors of a user, a file or the machine become one line on stderr and a status."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        is_first = heed_interrupts()
        sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()  # None if closed: `… >&-`
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # so that ASCII and Latin-1 can print every name
        try:
            main(*args, **kwargs)
            _flush()
        except (Exception, KeyboardInterrupt) as error:
            status, line = answer_to(error)
            _flush(drop=True)
            if status == 1:
                sys.exit(line)  # Python prints it
            print(line, end="\n" if line else "", file=sys.stderr)
            sys.exit(status)
        finally:
            if is_first:
                leave_at_once()

    return run


def answer_to(error: BaseException) -> tuple[int, str]:
    """The exit status and the last line of a program.  An error in this project's own code is raised again."""
    match error:
        case UserError():
            return 1, f"error: {error}"
        case Stopped():
            return 128 + error.signal, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case BrokenPipeError():  # the reader of a pipe went away: `… | head`
            return 141, ""
        case OSError():
            problem = _of_the_system(error)
        case _ if is_out_of_memory(error):
            problem = "there is not enough memory: use a smaller model, batch or text, or close other programs"
        case RecursionError() | UnicodeError() | OverflowError():
            (place,) = traceback.extract_tb(error.__traceback__, limit=-1)
            name = Path(place.filename).name
            problem = f"a text or number of the input cannot be used ({name}:{place.lineno}: {error})"
        case _:
            raise error
    return 1, f"error: {printable(problem)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out.  PyTorch's allocators raise a plain RuntimeError for it, recognised by its text."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def _of_the_system(error: OSError) -> str:
    name, reason = error.filename or "a file", error.strerror or str(error) or type(error).__name__
    name = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room to write {name} ({reason}): free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot use {name} ({reason}): check its permissions"
    return f"cannot use {name} ({reason})" if error.filename else reason


def _flush(*, drop: bool = False) -> None:
    """Write what was printed; `drop` discards what cannot be written, or Python would fail again when it exits."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        if not drop:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_at_once() -> None:
    """Let Ctrl-C end the program at once during imports and exit, where KeyboardInterrupt looks like a failure."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def heed_interrupts() -> bool:
    """Let Ctrl-C raise KeyboardInterrupt again -> whether it did not before."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        return False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return True


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
