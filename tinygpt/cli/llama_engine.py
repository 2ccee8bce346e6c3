"""llama.cpp on a GGUF file: its tokens and its logits.  Tokens are chosen by us, so that options mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from tinygpt.cli.sampling import Settings
from tinygpt.errors import UserError
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.generate import Answer
from tinygpt.generate.answer import choose_rows, keep_logprobs
from tinygpt.generate.decoder import slide
from tinygpt.params import ParamsError

MOST_CONTEXT = 8192  # tokens: keys and values of all that a large model could read would not fit in memory


class LlamaVocabulary:
    """The tokenizer in a GGUF file."""

    def __init__(self, llama: LlamaCpp) -> None:
        self.vocab_size, self.eos_id = llama.vocab_size, llama.eos_id
        self.bos_id = llama.bos_id if llama.bos_id >= 0 else llama.eos_id
        self.encode, self._piece = llama.tokenize, llama.piece

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to the bytes they stand for."""
        return b"".join(map(self._piece, ids))


class LlamaEngine:
    """A GGUF file open in llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Raises UserError with llama.cpp's reason when it cannot load the file, or where no token ends a text."""
        self._llama = LlamaCpp(path, n_ctx=MOST_CONTEXT, n_threads=torch.get_num_threads())
        if self._llama.eos_id < 0:
            self._llama.close()
            raise UserError(f"{path} names no token that ends a text: convert the model again, with its tokenizer")
        self._ends = tuple(self._llama.eog_ids())  # all of them, as llama.cpp has it
        self.vocabulary, self.block_size = LlamaVocabulary(self._llama), self._llama.n_ctx

    def begin(self, prompt: str, settings: Settings, *, seed: int, n_logprobs: int | None = None) -> Answer:
        """An answer without a token.  Raises UserError where the prompt or the settings do not fit the model."""
        chosen = settings.sampling
        sampling = dataclasses.replace(
            chosen,
            seed=seed,
            stop_ids=(*chosen.stop_ids, *self._ends),
            banned_ids=(*chosen.banned_ids, *(self._ends if chosen.ignore_eos else ())),
        )
        return Answer(
            [self.vocabulary.bos_id, *self.vocabulary.encode(prompt)],
            self.vocabulary,
            sampling,
            max_new_tokens=settings.length.max_new_tokens,
            block_size=self.block_size,
            n_logprobs=n_logprobs,
        )

    def extend(self, answers: Sequence[Answer], *, at_once: int) -> Iterator[list[Answer]]:
        """Extend each to its end, one after the other; yields the one that just got a token."""
        for answer in answers:
            seen = answer.prompt[-self.block_size :]
            logits = self._llama.read(seen)
            while True:
                rows = torch.from_numpy(logits)[None]
                (chosen,) = choose_rows(rows, [answer])
                keep_logprobs(rows, [answer], [chosen])
                answer.add(chosen)
                yield [answer]
                if answer.finish_reason:
                    break
                seen.append(answer.ids[-1])
                is_new = slide(seen, self.block_size)
                logits = self._llama.read(seen) if is_new else self._llama.append(seen[-1])

    def search(self, prompt: str, settings: Settings, *, n_logprobs: int | None = None) -> Answer:
        """Raises ParamsError: several texts side by side are not for llama.cpp here."""
        raise ParamsError(["n_beam and best_of cannot be had with llama.cpp: searches are of tinygpt's engine"])
