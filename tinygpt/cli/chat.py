"""`python -m tinygpt chat`: answer each typed line with the model's continuation of the chat, or run its command."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinygpt.cli.engine import Engine, open_engine, read_engine
from tinygpt.cli.flags import given, named_as_flags, parse_settings, read_settings
from tinygpt.cli.generate import open_output, say
from tinygpt.cli.texts import decode_utf8, read_some, standard_input
from tinygpt.errors import UserError, answer_to, printable
from tinygpt.files import write_text
from tinygpt.options import Settings, checked, make_settings, seed_after, setting_options, together
from tinygpt.params import nearest, require

MOST_LINES = 1000  # kept in the history
MARK = "> "


def chat(args: Namespace) -> None:
    """Answer until the input ends."""
    settings, options = together(partial(read_settings, args), partial(read_engine, args))
    open_output()
    with named_as_flags():
        engine = open_engine(options, n_row=settings.n_row)
        conversation = Conversation(engine, given(args, setting_options()))
    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    try:
        try:
            for line in lines_of_chat():
                follow(line, conversation)
        finally:  # another Ctrl-C would lose the history or, as Python exits and drops its handlers, the exit status
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # at the prompt, where it means "leave"
        print(file=sys.stderr)
    except EOFError:  # /quit
        pass


def follow(line: str, conversation: Conversation) -> None:
    """Answer a line, or run its command.  Errors are printed.  Raises EOFError to leave."""
    try:
        if line.startswith("/"):
            obey(line, conversation)
        elif line:
            conversation.answer(line)
    except KeyboardInterrupt:
        print("(stopped)", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None:  # it is standard output that failed
            raise
        print(answer_to(error)[1], file=sys.stderr)


class Conversation:
    """The messages so far, and the settings for the next answer."""

    def __init__(self, engine: Engine, given: dict[str, Any]) -> None:
        """`given` are settings by name.  Raises ParamsError with everything that is wrong with them."""
        self.engine, self.given = engine, dict[str, Any]()
        self.turns: list[tuple[str, str]] = []  # lines and answers
        self.set(given)
        self._n_retries = 0
        self._has_warned = False  # that the model no longer reads the beginning

    def set(self, given: dict[str, Any], problems: Iterable[str] = ()) -> None:
        """Change settings.  Raises ParamsError with everything that is wrong, and then changes none."""

        def changed() -> Settings:
            settings = make_settings(self.given | given)
            settings.check_ids(self.engine.vocabulary.vocab_size)
            return settings

        _, self.settings = together(lambda: require(*((False, problem) for problem in problems)), changed)
        self.given |= given

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns, self._has_warned = [], False

    def answer(self, line: str, *, n_retries: int = 0) -> None:
        """Print the answer to a line; Ctrl-C cuts it short.  Raises UserError if the line cannot be answered."""
        turns = self.turns[:-1] if n_retries else self.turns
        prompt, seed = f"{text_of(turns)}{line}\n", seed_after(self.settings.seed, n_retries)
        begun = self.engine.begin(prompt, self.settings, seed=seed)
        n, most = len(begun.prompt), self.engine.block_size
        if n > most and not self._has_warned:
            print(f"(the conversation has {n} tokens: only the last {most} are read)", file=sys.stderr)
            self._has_warned = True
        self._n_retries = n_retries
        try:
            for _ in self.engine.extend([begun], at_once=1, search=self.settings):
                say(begun.piece)
        except KeyboardInterrupt:
            print("(stopped)", end="", file=sys.stderr, flush=True)
        self.turns = [*turns, (line, begun.text)]
        say("\n")

    def retry(self) -> None:
        """Answer the last line again, with the next seed.  Raises UserError if there is none yet."""
        if not self.turns:
            raise UserError("nothing has been said yet: /retry answers the last line again")
        self.answer(self.turns[-1][0], n_retries=self._n_retries + 1)


def text_of(turns: Sequence[tuple[str, str]]) -> str:
    """Lines and their answers as the text that the model reads."""
    return "".join(f"{line}\n{answer}\n" for line, answer in turns)


# ---- lines that begin with a slash ----


def obey(line: str, conversation: Conversation) -> None:
    """Run the command in a line.  Raises UserError if it is unknown or fails, EOFError to leave."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or ": /help lists the commands; a line that begins with a space is sent as text"
        raise UserError(f"unknown command {name}{hint}")
    COMMANDS[name][2](conversation, rest.strip())


def show_help(conversation: Conversation, rest: str) -> None:
    """List the commands."""
    usages = [f"{name} {rest}" for name, (rest, _, _) in COMMANDS.items()]
    for usage, (_, help, _) in zip(usages, COMMANDS.values(), strict=True):
        print(f"{usage:{max(map(len, usages))}}  {help}")


def show(conversation: Conversation, rest: str) -> None:
    """Print the settings, and how long the conversation is."""
    for name in setting_options():
        print(f"{name}={printable(json.dumps(getattr(conversation.settings, name), ensure_ascii=False))}")
    turns, engine = conversation.turns, conversation.engine
    n = len(engine.vocabulary.encode(text_of(turns)))
    print(f"answers: {len(turns)}, tokens: {n}; the model reads at most {engine.block_size}")


def set_options(conversation: Conversation, rest: str) -> None:
    """Change settings."""
    if not rest:
        raise UserError("give options and values, such as /set temperature=0.5 top_k=40; /show lists them")
    conversation.set(*parse_settings(rest))


def save(conversation: Conversation, rest: str) -> None:
    """Write the conversation to a new file."""
    if not rest:
        raise UserError("give the name of a file, such as /save talk.txt")
    require(("\0" not in rest, "a name cannot hold a zero byte"))
    try:
        path = Path(rest).expanduser()
    except RuntimeError:
        raise UserError(f"{rest} begins with the home of an unknown user: give the whole path") from None
    if path.exists():
        raise UserError(f"{path} already exists: give another name")
    write_text(path, "".join(f"> {line}\n{answer}\n" for line, answer in conversation.turns))
    print(f"{printable(path)} has the conversation")


def leave(conversation: Conversation, rest: str) -> None:
    """Leave."""
    raise EOFError


# By name: its arguments, its help text and its function.
COMMANDS: dict[str, tuple[str, str, Callable[[Conversation, str], None]]] = {
    "/help": ("", "this list", show_help),
    "/set": ("NAME=VALUE …", """change how answers are chosen: temperature=0.5 stop=["\\n"]""", set_options),
    "/show": ("", "all of these options, and how long the conversation is", show),
    "/retry": ("", "another answer to the last line", lambda conversation, _: conversation.retry()),
    "/reset": ("", "forget the conversation", lambda conversation, _: conversation.reset()),
    "/save": ("FILE", "write the conversation to a new file", save),
    "/quit": ("", "leave, as Ctrl-D does", leave),
}


# ---- typed lines ----


def lines_of_chat() -> Iterator[str]:
    """Each line without its line end, until the input ends.  Raises UserError if a file is not UTF-8."""
    if sys.stdin and sys.stdin.isatty():
        yield from _typed_lines()
        return
    lines = iter(lambda: read_some(standard_input(), "a line of standard input", line=True), b"")
    for number, raw in enumerate(lines, start=1):
        yield decode_utf8(raw.rstrip(b"\r\n"), "standard input", line=number)


def history_file() -> Path:
    """Where typed lines are kept: tinygpt/history in XDG's folder for state, by default ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()) / "tinygpt" / "history"


def _typed_lines() -> Iterator[str]:
    _open_history()
    while True:
        try:
            if not sys.stdout.isatty():  # keep the prompt out of the file that the answers go to
                print(MARK, end="", file=sys.stderr, flush=True)
            yield checked(input(MARK if sys.stdout.isatty() else ""))
        except EOFError:
            print(file=sys.stderr)
            return
        except (UnicodeDecodeError, UserError):
            print("error: that line was not UTF-8: set the terminal to UTF-8", file=sys.stderr)


def _open_history() -> None:
    """Let typed lines be edited, and keep them for the next time.  This needs readline and a home folder."""
    try:
        import readline

        path = history_file()
    except (ImportError, RuntimeError):
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MOST_LINES)

    @atexit.register
    def keep() -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # what people type is private
            readline.write_history_file(path)
