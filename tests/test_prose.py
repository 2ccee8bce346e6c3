"""Phrases that make a reader stumble, in everything that people read: pages, params, help, errors, code, tests."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

STUMBLES = {
    r"(?<!there )(?<!There )\b(is|are|was|were) no (?!longer|more|less|better|worse|different)": "is not a …",
    r"\bbeside\b": "next to, alongside",
    r"\btells?\b (?!apart)": "says, reports",
    r"(^|[.|] )Of [a-z]": "begin with the subject",
    r"\blikewise\b": "the same, too",
    r"\bhours? gone\b|\bminutes? gone\b|\bseconds? gone\b": "elapsed",
}
IN_NAMES = STUMBLES | {r"\btold\b": "reported", r"\bgo(es|ing)? on\b": "continues", r"\bbehind\b": "after, past"}
READ = ("*.md", "docs/*.md", "presets/*.yaml", "params.yaml")
PAGES = sorted(path.relative_to(ROOT) for names in READ for path in ROOT.glob(names))
CODE = sorted(path.relative_to(ROOT) for folder in ("tinygpt", "stages") for path in (ROOT / folder).rglob("*.py"))


def stumbles(text: str, phrases: dict[str, str] = STUMBLES) -> list[str]:
    """Where a phrase is, and what to say instead."""
    found = []
    for phrase, instead in phrases.items():
        for match in re.finditer(phrase, text, re.MULTILINE):
            around = " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
            found.append(f"{around!r}: {instead}")
    return found


def strings(path: Path) -> Iterator[str]:
    """Docstrings, messages and other strings of a file, and its comments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    with path.open("rb") as file:
        yield from (token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_read_well(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert stumbles(text) == []


@pytest.mark.parametrize("path", CODE, ids=str)
def test_messages_and_docstrings_read_well(path):
    assert [each for text in strings(ROOT / path) for each in stumbles(text)] == []


def test_tests_are_named_in_plain_english():
    names = (name for path in ROOT.glob("tests/*.py") for name in re.findall(r"def test_(\w+)", path.read_text()))
    assert [each for name in names for each in stumbles(name.replace("_", " "), IN_NAMES)] == []
