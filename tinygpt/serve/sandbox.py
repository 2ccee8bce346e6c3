"""A program that renders chat templates: each line of JSON that it reads is a template with its values, each that it
writes a text or what is wrong.

Templates come from elsewhere. Jinja's sandbox keeps them from all but their values, as transformers does; and as a
process of its own, with a bound on its memory, this may be killed by who waits for it (`template.py`). It imports
nothing of tinygpt.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

MOST_MEMORY = 2**29  # bytes of addresses, of which Python takes less than half


class Names(Namespace):
    """A namespace without names such as `__class__`, with which it could pass for another object."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have the name {name[:100]}")
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


def make_environment() -> ImmutableSandboxedEnvironment:
    """With what transformers lets templates use."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals = {
        "range": safe_range,
        "namespace": Names,
        "dict": lambda **values: values,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def render(environment: ImmutableSandboxedEnvironment, source: str, values: dict[str, Any] | None, most: int) -> str:
    """The text of a template, nothing without values.  Raises exceptions of all kinds: a template is a program."""
    template, text = environment.from_string(source), ""
    for part in template.generate(values) if values is not None else ():
        text += part
        if len(text) > most:
            raise SecurityError(f"it writes more than {most:,} characters")
    return text


def main() -> None:
    """Answer until the input ends."""
    with suppress(ImportError, ValueError, OSError):  # another system, or a stricter bound
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    environment = make_environment()
    for line in sys.stdin:
        try:
            answer = {"text": render(environment, **json.loads(line))}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
