"""Gopher's rules, each broken by a text made for it."""

import pytest

from tinygpt.corpus.quality import RULES, broken_rules

PROSE = "The words of this line have to be read with care, and that takes some time.\n" * 5
BROKEN = {
    "word_count": "The cat sat with the dog and waited.",
    "word_length": PROSE + "aVeryLongIdentifierWithoutAnySpaceInIt_" * 30,
    "symbols": PROSE + "# " * 10,
    "bullets": "".join(f"  {bullet} {line}\n" for bullet, line in zip("•-*•-", PROSE.splitlines(), strict=True)),
    "ellipses": PROSE.replace("time.\n", "time...\n", 2),
    "letters": PROSE + "1234567 8.90123 " * 15,
    "stop_words": "Cats sleep where dogs wait, chasing some small grey mice.\n" * 6,
}


def test_prose_breaks_no_rule():
    assert broken_rules(PROSE) == []


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_broken_by_its_text_alone(rule):
    assert broken_rules(BROKEN[rule]) == [rule]


@pytest.mark.parametrize("text", ["a", "…", "\n\n#\n", "中文" * 100])
def test_any_text_has_an_answer(text):
    assert "word_count" in broken_rules(text)
