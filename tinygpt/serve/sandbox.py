"""A program that renders chat templates.  It reads lines of JSON, each a template with its values, and answers each
with a line of JSON: the text, or an error.

Templates come from elsewhere, so they are not trusted. Jinja's sandbox, set up as in transformers, gives them access to
their values alone. This program is a process of its own with bounded memory, which `template.py` kills when it takes
too long. It imports nothing from tinygpt.
"""

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_MEMORY = 2**29  # bytes of address space; Python itself takes less than half
MARK = "\ufdd0"  # is in what looks like a special token, and does not count; Unicode keeps it for such uses


class Generation(Extension):
    """Renders the content of `{% generation %}`, with which templates mark answers for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse messages."""
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The same as in transformers: Jinja's own tojson is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def make_environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the filters and functions that transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def render(environment: ImmutableSandboxedEnvironment, source: str, values: dict[str, Any] | None, most: int) -> str:
    """The text of a template; without values it is only parsed.  Raises any exception: a template is a program."""
    template, parts, n = environment.from_string(source), [], 0
    for part in template.generate(values) if values is not None else ():
        parts.append(part)
        n += len(part) - part.count(MARK)
        if n > most:
            raise SecurityError(f"it writes more than {most:,} characters")
    return "".join(parts)


def main() -> None:
    """Answer each line until the input ends."""
    with suppress(ValueError, OSError):  # a stricter bound is already set, or macOS has none
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
