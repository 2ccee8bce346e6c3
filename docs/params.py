"""docs/params.md: every key of params.yaml with its default, what it takes and what it does.

python -m docs.params                 # writes docs/params.md
"""

import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from tinygpt.params import DERIVED, GROUPS, PARAMS_FILE, Within, find_class

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/params.md")
HEAD = """# All params

Made from `params.yaml` and the dataclasses that read it, by `python -m docs.params`. Set a key in `params.yaml`, or
with `dvc exp run -S group.key=value`, which writes it there. A wrong key, type or value is refused before the first
stage works, with the nearest right name. DVC runs the stages that read what has changed, and those after them.
"""
TABLE = "| key | default | takes | what it does |\n|---|---|---|---|\n"
LINE = re.compile(
    r"^(?:(?P<group>\w+):|  (?P<key>\w+):\s*(?P<value>[^#]*?)|\s+(?P<item>- [^#]*?)?)\s*(?:# (?P<text>.*))?$"
)
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def page() -> str:
    """The whole page."""
    described = comments((ROOT / PARAMS_FILE).read_text())
    parts = [HEAD]
    for group in GROUPS:
        cls = find_class(group)
        module = cls.__module__.replace(".", "/")
        parts.append(f"\n## {group}\n\nRead in `{module}.py`.\n\n{TABLE}")
        hints = typing.get_type_hints(cls, include_extras=True)
        for (of, key), (value, text) in described.items():
            if of == group:
                parts.append(
                    f"| `{key}` | {f'`{value}`' if value else 'null'} | {taken(hints[key])} | {cell(text)} |\n"
                )
    return "".join(parts)


def comments(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """The value and the comment of each (group, key) of params.yaml, a comment's further lines joined."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    group = key = ""
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None or not line.strip():
            continue
        said = match["text"] or ""
        if match["group"]:
            group, key = match["group"], ""
        elif match["key"]:
            key = match["key"]
            found[group, key] = match["value"].replace("null", ""), said
        elif key:
            value, before = found[group, key]
            item = (match["item"] or "").removeprefix("- ")
            found[group, key] = ", ".join(filter(None, [value, item])), f"{before} {said}".strip()
    return found


def taken(hint: Any) -> str:
    """What a type admits, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [f"in {each.interval.replace('inf', '∞')}" for each in args[1:] if isinstance(each, Within)]
        return " ".join([taken(args[0]), *bounds, *(["or null"] if DERIVED in args else [])])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(taken, args)))
    if origin is tuple:
        return f"a list: {taken(args[0])}"
    if hint in NAMES:
        return NAMES[hint]
    return "{" + ", ".join(each for each in typing.get_type_hints(hint) if each != "group") + "}"


def cell(text: str) -> str:
    """A text that does not end its cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page())
