"""How many documents look unlike prose, by the rules of Gopher's corpus.  Nothing is dropped for it: code and plays are
unlike prose too.

The rules are those of Rae et al. 2021, "Scaling Language Models" (https://arxiv.org/abs/2112.11446), table A1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]
STOP_WORD_OF = {form: word for word in STOP_WORDS for form in (word, word.capitalize(), word.upper())}
LETTER = re.compile(r"[^\W\d_]")
BULLETS = ("•", "-", "*")
ELLIPSES = ("...", "…")

# Rule -> whether a text, its words and its lines (one or more of each) break it.
RULES: dict[str, Callable[[str, Sequence[str], Sequence[str]], bool]] = {
    "word_count": lambda text, words, lines: not 50 <= len(words) <= 100_000,
    "word_length": lambda text, words, lines: not 3 <= sum(map(len, words)) / len(words) <= 10,
    "symbols": lambda text, words, lines: text.count("#") + sum(map(text.count, ELLIPSES)) > 0.1 * len(words),
    "bullets": lambda text, words, lines: _share(lines, lambda line: line.lstrip().startswith(BULLETS)) > 0.9,
    "ellipses": lambda text, words, lines: _share(lines, lambda line: line.rstrip().endswith(ELLIPSES)) > 0.3,
    "letters": lambda text, words, lines: _share(words, LETTER.search) < 0.8,
    "stop_words": lambda text, words, lines: len({STOP_WORD_OF[word] for word in words if word in STOP_WORD_OF}) < 2,
}


def broken_rules(text: str) -> list[str]:
    """Names of the rules that a text breaks, which has more than white space in it."""
    words, lines = text.split(), [line for line in text.split("\n") if line.strip()]
    return [name for name, is_broken in RULES.items() if is_broken(text, words, lines)]


def _share(things: Sequence[str], holds: Callable[[str], object]) -> float:
    return sum(map(bool, map(holds, things))) / len(things)
