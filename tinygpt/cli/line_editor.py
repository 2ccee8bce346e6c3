"""Lines that a user types, with editing and a history where Python has readline, or those of a file."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tinygpt.cli.prompts import decode_utf8, standard_input
from tinygpt.errors import UserError
from tinygpt.generate.answer import checked

MOST_LINES = 1000  # of the history
MARK = "> "


def read_lines() -> Iterator[str]:
    """Each line without its end, until the input ends.  Raises UserError where a file is no UTF-8."""
    if sys.stdin and sys.stdin.isatty():
        yield from _typed_lines()
        return
    for number, raw in enumerate(standard_input(), start=1):
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
            print("error: that line was no UTF-8: set the terminal to it", file=sys.stderr)


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
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # what one types is nobody else's
        readline.write_history_file(path)
