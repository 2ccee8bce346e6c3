"""A conversation with a model that continues text: lines and answers, one below the other."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from tinygpt.cli.engine import Engine
from tinygpt.cli.output import say
from tinygpt.cli.sampling import Settings, make_settings
from tinygpt.errors import UserError
from tinygpt.generate import Search
from tinygpt.generate.options import seed_after


class Conversation:
    """What was said, and how the next answer is chosen."""

    def __init__(self, engine: Engine, given: dict[str, Any]) -> None:
        """`given` are settings by name.  Raises ParamsError with all that is wrong with them."""
        self.engine, self.given = engine, dict[str, Any]()
        self.turns: list[tuple[str, str]] = []  # lines and answers
        self.set(given)
        self._n_retries = 0
        self._is_told = False  # that the beginning is no longer read

    def check(self, given: dict[str, Any]) -> Settings:
        """What settings would become.  Raises ParamsError with all that is wrong."""
        settings = make_settings(self.given | given)
        settings.sampling.check_ids(self.engine.vocabulary.vocab_size)
        return settings

    def set(self, given: dict[str, Any]) -> None:
        """Change settings.  Raises ParamsError with all that is wrong; then all stay as they are."""
        self.settings, self.given = self.check(given), self.given | given

    def text(self) -> str:
        """What the model has read so far."""
        return "".join(f"{line}\n{answer}\n" for line, answer in self.turns)

    def reset(self) -> None:
        """Forget all of it."""
        self.turns, self._is_told = [], False

    def answer(self, line: str, *, n_retries: int = 0) -> None:
        """Print the answer to a line; Ctrl-C ends it where it is.  Raises UserError where there can be none."""
        prompt, seed = f"{self.text()}{line}\n", seed_after(self.settings.sampling.seed, n_retries)
        begun = self.engine.begin(prompt, self.settings, seed=seed)
        self._tell_of_context(len(begun.prompt))
        self.turns.append((line, ""))
        self._n_retries = n_retries
        try:
            if self.settings.search == Search():
                for _ in self.engine.extend([begun], at_once=1):
                    say(begun.piece)
            else:
                sampling = dataclasses.replace(self.settings.sampling, seed=seed)
                begun = self.engine.search(prompt, dataclasses.replace(self.settings, sampling=sampling))
                say(begun.text)
        except KeyboardInterrupt:
            print("(stopped)", end="", file=sys.stderr, flush=True)
        except UserError:
            self.turns.pop()
            raise
        self.turns[-1] = (line, begun.text)
        say("\n")

    def retry(self) -> None:
        """Answer the last line again, with the next seed.  Raises UserError without one."""
        if not self.turns:
            raise UserError("nothing was said yet: /retry answers the last line again")
        line, answer = self.turns.pop()
        n = len(self.turns)
        try:
            self.answer(line, n_retries=self._n_retries + 1)
        finally:
            if len(self.turns) == n:  # there was none, or Ctrl-C came before it began
                self.turns.append((line, answer))

    def _tell_of_context(self, n_token: int) -> None:
        if n_token > self.engine.block_size and not self._is_told:
            most = self.engine.block_size
            print(f"(the conversation has {n_token} tokens: the last {most} are read)", file=sys.stderr)
            self._is_told = True
