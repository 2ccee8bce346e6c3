"""Messages to a prompt: by the chat template of a tokenizer, or a plain one.  Templates come from elsewhere: Jinja's
sandbox runs them, as in transformers, and an end is set to their time and their text.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from tinygpt.errors import UserError
from tinygpt.files import must_exist, read_json
from tinygpt.generate.answer import checked
from tinygpt.tokenizer import Tokenizer

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
MOST_SOURCE = 2**20  # characters of a template
MOST_SECONDS = 2
PLAIN_SOURCE = """\
{{ bos_token }}
{%- for message in messages %}
{{- {"user": "User: ", "assistant": "Assistant: "}[message.role] }}{{ message.content | trim }}
{% endfor %}
{{- "Assistant:" if add_generation_prompt }}"""


@dataclass(frozen=True)
class Template:
    """How messages become a prompt, and what ends an answer besides `<|endoftext|>`."""

    source: str
    tokens: Mapping[str, str]  # special tokens by the names that the template has for them
    stop: tuple[str, ...] = ()

    def prompt(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, most: int) -> tuple[str, list[int]]:
        """The text of messages up to the answer, and its ids.

        The special tokens of the template become ids; what looks like one in a message stays text. Raises UserError
        where the template fails, takes too long or writes more than `most` characters, or where there is no text.
        """
        names = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
        said = {char for message in messages for text in message.values() for char in text}
        mark = next(chr(i) for i in range(0xE000, 0x10FFFF) if chr(i) not in said)
        marked = [
            {key: re.sub(names, lambda found: found[0][0] + mark + found[0][1:], text) for key, text in each.items()}
            for each in messages
        ]
        parts = re.split(f"({names})", checked(self._render(marked, tokenizer, most)))
        ids = [
            i
            for place, part in enumerate(parts)
            for i in ([tokenizer.special_tokens[part]] if place % 2 else tokenizer.encode(part.replace(mark, "")))
        ]
        return "".join(parts).replace(mark, ""), ids

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The token with which the template ends a message."""
        name = self.tokens.get("eos_token")
        return (tokenizer.special_tokens[name],) if name in tokenizer.special_tokens else ()

    def _render(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, most: int) -> str:
        names = {"bos_token": tokenizer.tokens[tokenizer.bos_id], "eos_token": tokenizer.tokens[tokenizer.eos_id]}
        text = ""
        try:
            with deadline(MOST_SECONDS):
                for part in compiled(self.source).generate(
                    messages=messages, add_generation_prompt=True, **names | dict(self.tokens)
                ):
                    text += part
                    if len(text) > most:
                        raise SecurityError(f"it writes more than {most:,} characters")
        except Exception as error:  # of any kind: the template is a program
            raise UserError(f"the chat template refuses these messages: {error}") from None
        return text


PLAIN = Template(PLAIN_SOURCE, {}, ("\nUser:",))


def load_template(folder: Path) -> Template:
    """The chat template of a tokenizer's folder, as transformers saves it, or the plain one.

    Raises UserError where it is none.
    """
    config = read_json(folder / CONFIG_FILE, stage="train") if (folder / CONFIG_FILE).exists() else {}
    path = folder / (TEMPLATE_FILE if (folder / TEMPLATE_FILE).exists() else CONFIG_FILE)
    source = read_text(path) if path.name == TEMPLATE_FILE else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}.get("default")
    if source is None:
        return PLAIN
    try:
        if not isinstance(source, str) or len(source) > MOST_SOURCE:
            raise ValueError(f"not a text of at most {MOST_SOURCE:,} characters")
        compiled(source)
    except (TemplateError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its chat template cannot be read ({error}): mend it, or take it out") from None
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if re.fullmatch("(bos|eos|pad|unk)_token", name)
    }
    return Template(source, {name: value for name, value in tokens.items() if isinstance(value, str)})


def read_text(path: Path) -> str:
    """A file in UTF-8."""
    try:
        return must_exist(path, stage="train").read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 ({error})") from None


# ---- the sandbox ----


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, in which a text cannot be multiplied."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A product or power of small numbers."""
        if not all(isinstance(value, int | float) and abs(value) < 2**20 for value in (left, right)):
            raise SecurityError(f"{operator} is of small numbers alone")
        if operator == "**" and abs(right) > 20:
            raise SecurityError("** has an exponent above 20")
        return super().call_binop(context, operator, left, right)


class Names(Namespace):
    """A namespace without names such as `__class__`, with which it could pass for another object."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have the name {name[:100]!r}")
        super().__setitem__(name, value)


class Generation(Extension):
    """`{% generation %}`, with which templates mark answers for training: its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """What is between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """With which templates refuse messages."""
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers has it: Jinja's own is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def make_sandbox() -> Sandbox:
    """With what templates of transformers may use."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals = {
        "range": safe_range,
        "namespace": Names,
        "dict": lambda **values: values,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return sandbox


@functools.cache  # a millisecond each
def compiled(source: str) -> jinja2.Template:
    """A template that can run."""
    return SANDBOX.from_string(source)


SANDBOX = make_sandbox()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block, in this thread, at the first line of Python after some seconds."""
    ends, before = time.monotonic() + seconds, sys.gettrace()

    def look(frame: types.FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > ends:
            raise TimeoutError(f"it takes more than {seconds} seconds")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
