"""`python -m tinygpt chat`: answer each line with what the model makes of all lines so far."""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial

from tinygpt.cli.chat_commands import Leave, obey
from tinygpt.cli.conversation import Conversation
from tinygpt.cli.engine import add_engine_options, check_engine, open_engine
from tinygpt.cli.line_editor import read_lines
from tinygpt.cli.output import open_output
from tinygpt.cli.sampling import (
    Settings,
    add_sampling_options,
    given_settings,
    named_as_options,
    read_settings,
    together,
)
from tinygpt.errors import UserError


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_sampling_options(command)
    add_engine_options(command)


def run(args: argparse.Namespace) -> None:
    """Answer until the input ends."""
    settings: Settings = together(partial(read_settings, args), partial(check_engine, args))[0]
    open_output()
    with named_as_options():
        conversation = Conversation(open_engine(args, n_row=settings.search.n_row), given_settings(args))
    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    try:
        try:
            for line in read_lines():
                follow(line, conversation)
        finally:  # another Ctrl-C would take the history or, late in Python's end, which ends this handler, the status
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # at the mark, where it means to go
        print(file=sys.stderr)
    except Leave:
        pass


def follow(line: str, conversation: Conversation) -> None:
    """Answer a line, or do what it says.  What cannot be done is told; only Leave is raised."""
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
        if error.filename is None:  # the output itself is gone
            raise
        print(f"error: cannot use {error.filename} ({error.strerror})", file=sys.stderr)
