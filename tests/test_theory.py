"""docs/theory.md: its examples, the code that it refers to, and the plain tokenizer that it shows."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
from conftest import TRICKY, prose
from hypothesis import given, settings
from project import ROOT

from tinygpt.errors import UserError
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.plain_bpe import apply_merges, learn_merges

PAGE = (ROOT / "docs/theory.md").read_text()


def test_every_number_of_the_theory_page_is_reproduced(monkeypatch):
    monkeypatch.chdir(ROOT)
    session = doctest.DocTestParser().get_doctest(
        re.sub(r"^```.*$", "", PAGE, flags=re.MULTILINE), {}, "theory", None, 0
    )
    assert len(session.examples) > 100
    assert doctest.DocTestRunner().run(session).failed == 0


def test_the_code_that_the_theory_page_names_exists():
    for path in set(re.findall(r"`(tinygpt/[\w/]+\.py)`", PAGE)):
        assert (ROOT / path).is_file(), path
    for names, path in re.findall(r"Code: (.+?) in\s+`(tinygpt/[\w/]+)\.py`", PAGE):
        module = importlib.import_module(path.replace("/", "."))
        for name in re.findall(r"`(\w+)", names):
            assert hasattr(module, name), f"{name} in {path}"


def test_the_figures_of_the_theory_page_exist():
    figures = re.findall(r"!\[.+?\]\((figures/\w+\.svg)\)", PAGE)
    assert len(figures) >= 5
    of_others = {ROOT / f"docs/figures/{name}.svg" for name in ("overview", "scaling")}
    assert {ROOT / "docs" / figure for figure in figures} | of_others == set((ROOT / "docs/figures").glob("*.svg"))


def learned_both_ways(text: str, vocab_size: int) -> None:
    tokenizer = train_bpe([text], vocab_size)
    merges = learn_merges(text, len(tokenizer.merges))
    assert merges == tokenizer.merges
    assert apply_merges(text, merges) == [tokenizer.tokens[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize("text", [prose(3000), Path(doctest.__file__).read_text()[:20_000]], ids=["prose", "code"])
def test_the_plain_tokenizer_learns_the_same_merges(text):
    learned_both_ways(text, 400)


@settings(max_examples=50, deadline=None)
@given(TRICKY)
def test_the_plain_tokenizer_gives_the_ids_of_the_fast_one(text):
    try:
        train_bpe([text * 3], 260)
    except UserError:  # too few pairs
        return
    learned_both_ways(text * 3, 260)
