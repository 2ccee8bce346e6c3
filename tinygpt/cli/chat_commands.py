"""The commands of `python -m tinygpt chat`: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt.cli.conversation import Conversation
from tinygpt.cli.prompts import raise_some
from tinygpt.cli.sampling import NAMES, together, values_of
from tinygpt.errors import UserError
from tinygpt.files import atomic_write

LISTS = ("logit_bias", "banned_ids", "stop", "stop_ids")
WORDS = ("early_stopping", "when_full")


class Leave(Exception):
    """The user wants to go."""


class Command(NamedTuple):
    """What can be typed, and what it does."""

    usage: str
    help: str
    run: Callable[[Conversation, str], None]


def obey(line: str, conversation: Conversation) -> None:
    """Run the command of a line.  Raises UserError where there is none, or where it cannot be done, and Leave."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands, a space before it makes it text"
        raise UserError(f"unknown command {name}: {hint}")
    COMMANDS[name].run(conversation, rest.strip())


def show_help(conversation: Conversation, rest: str) -> None:
    """List the commands."""
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        print(f"{command.usage:{width}}  {command.help}")


def show(conversation: Conversation, rest: str) -> None:
    """Print the settings and how much was said."""
    found = values_of(conversation.settings)
    for name in NAMES:
        print(f"{name}={json.dumps(found[name], ensure_ascii=False)}")
    n = len(conversation.engine.vocabulary.encode(conversation.text()))
    print(f"{answers(conversation)}, {n} tokens; the model reads {conversation.engine.block_size} at most")


def set_options(conversation: Conversation, rest: str) -> None:
    """Change settings."""
    if not rest:
        raise UserError("give options and values, such as /set temperature=0.5 top_k=40; /show lists them")
    given, problems = parse_settings(rest)
    together(partial(raise_some, problems), partial(conversation.check, given))
    conversation.set(given)


def reset(conversation: Conversation, rest: str) -> None:
    """Forget what was said."""
    conversation.reset()


def retry(conversation: Conversation, rest: str) -> None:
    """Answer again."""
    conversation.retry()


def save(conversation: Conversation, rest: str) -> None:
    """Write the conversation to a new file."""
    if not rest:
        raise UserError("give the name of a file, such as /save talk.txt")
    try:
        path = Path(rest).expanduser()
    except RuntimeError:
        raise UserError(f"{rest} begins with the home of a user who is not known: give the whole path") from None
    if path.exists():
        raise UserError(f"{path} is there already: give another name")
    with atomic_write(path) as file:
        file.writelines(f"> {line}\n{answer}\n" for line, answer in conversation.turns)
    print(f"{path}: {answers(conversation)}")


def answers(conversation: Conversation) -> str:
    """How many there are, in words."""
    n = len(conversation.turns)
    return "1 answer" if n == 1 else f"{n} answers"


def leave(conversation: Conversation, rest: str) -> None:
    """Go."""
    raise Leave


COMMANDS = {
    command.usage.split(" ")[0]: command
    for command in (
        Command("/help", "this list", show_help),
        Command("/set NAME=VALUE …", """change how answers are chosen: temperature=0.5 stop=["\\n"]""", set_options),
        Command("/show", "all of these options, and how long the conversation is", show),
        Command("/retry", "another answer to the last line", retry),
        Command("/reset", "forget the conversation", reset),
        Command("/save FILE", "write the conversation to a new file", save),
        Command("/quit", "leave, as Ctrl-D does", leave),
    )
}


def parse_settings(text: str) -> tuple[dict[str, Any], list[str]]:
    """'top_k=5 stop=["a b", "c"]' -> {"top_k": 5, "stop": ["a b", "c"]} and what is wrong.

    Values are JSON, or else a word.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    while text := text.lstrip():
        named = re.match(r"([\w-]+)=", text)
        if not named:
            word, text = _word(text)
            problems.append(f"{word!r} is not of the form NAME=VALUE")
            continue
        name = named[1].replace("-", "_")
        value, text = (_word if name in WORDS else _value)(text[named.end() :])
        if name in NAMES:
            found[name] = [value] if name in LISTS and not isinstance(value, list) else value
        else:
            near = difflib.get_close_matches(name, NAMES, n=1)
            problems.append(f"unknown option {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return found, problems


def _value(text: str) -> tuple[Any, str]:
    """The value that a text begins with, and what is behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if not text[end : end + 1].strip():  # else it is a word such as 5th
            return value, text[end:]
    except (ValueError, RecursionError):
        pass
    word, rest = _word(text)
    try:
        return float(word), rest  # .5 is no JSON
    except ValueError:
        return word, rest


def _word(text: str) -> tuple[str, str]:
    word, *rest = text.split(None, 1) or [""]
    return word, rest[0] if rest else ""
