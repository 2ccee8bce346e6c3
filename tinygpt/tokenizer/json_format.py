"""The `tokenizer.json` of the Hugging Face tokenizers library, read and written for byte-level BPE.

Format: https://huggingface.co/docs/tokenizers. What cannot be honoured exactly is refused. Tokens are in GPT-2's byte
alphabet (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), there called `ByteLevel`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import atomic_write, human_bytes, must_exist

MOST_BYTES = 500_000_000  # of a file; a vocabulary of 250,000 takes 20 MB
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes: itself where it is one, else the next from U+0100 on.

    32 -> "Ġ", 65 -> "A".
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def to_token(raw: bytes) -> str:
    """Bytes as a token's string: b" the" -> "Ġthe"."""
    return "".join(BYTE_TO_CHAR[byte] for byte in raw)


def to_bytes(token: str) -> bytes:
    """A token's string as its bytes: "Ġthe" -> b" the".  Raises KeyError for a character outside the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in token)


def write_tokenizer_json(
    path: Path, tokens: list[str], merges: list[tuple[str, str]], special_tokens: dict[str, int]
) -> None:
    """Write the file; its bytes depend on the arguments alone."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, i) for name, i in sorted(special_tokens.items(), key=lambda kv: kv[1])],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    with atomic_write(path) as file:
        json.dump(document, file, ensure_ascii=False, indent=1)
        file.write("\n")


def read_tokenizer_json(path: Path, *, required: str) -> tuple[list[str], list[tuple[str, str]], dict[str, int]]:
    """Return tokens in id order, merges in rank order, and special tokens.

    Raises UserError with everything that is wrong with the file, such as a missing special token `required`.
    """
    if must_exist(path, stage="train_tokenizer").stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than {human_bytes(MOST_BYTES)}, too large for a tokenizer")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        model = document["model"]
        vocab, merges = dict(model["vocab"]), [_pair(merge) for merge in model["merges"]]
        special = {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    problems = _kind_problems(document) + _vocab_problems(vocab | special, merges, set(special))
    if required not in special:
        problems.append(f"there is no special token {required}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return sorted(vocab | special, key=(vocab | special).__getitem__), merges, special


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _added_token(name: str, i: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": name, **flags}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge  # both spellings are in use
    return str(left), str(right)


def _kind_problems(document: dict[str, Any]) -> list[str]:
    """What in the file would make its ids differ from ours."""
    model, pre = document["model"], document.get("pre_tokenizer") or {}
    rules = (
        (model.get("type", "BPE") == "BPE", f"model.type is {model.get('type')!r}, not 'BPE'"),  # GPT-2's has none
        (document.get("normalizer") is None, "it has a normalizer"),
        (
            pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True),
            "pre_tokenizer is not ByteLevel with add_prefix_space false and use_regex true",
        ),
        *((not model.get(key), f"model.{key} is set") for key in ("dropout", "ignore_merges", "byte_fallback")),
    )
    return [problem for holds, problem in rules if not holds]


def _vocab_problems(vocab: dict[str, Any], merges: list[tuple[str, str]], special: set[str]) -> list[str]:
    problems = []
    ids = [*vocab.values()]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        problems.append(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    if missing := [char for char in BYTE_TO_CHAR if char not in vocab]:
        problems.append(f"{len(missing)} of the 256 bytes have no token")
    if foreign := [t for t in vocab if t not in special and not (t and set(t) <= CHAR_TO_BYTE.keys())]:
        problems.append(f"{len(foreign)} tokens are not byte-level, such as {foreign[0]!r}")
    if unknown := [m for m in merges if any(part not in vocab or part in special for part in (*m, "".join(m)))]:
        problems.append(f"{len(unknown)} merges have unknown parts, such as {' '.join(unknown[0])!r}")
    return problems
