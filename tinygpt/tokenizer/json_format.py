"""The `tokenizer.json` of the Hugging Face tokenizers library, read and written for byte-level BPE.

Format: https://huggingface.co/docs/tokenizers. A file that cannot be honoured exactly is refused. Tokens are written in
GPT-2's byte alphabet (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), which the library
calls `ByteLevel`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError, shown
from tinygpt.files import atomic_write, each_once, must_exist, parse_json, read_file, some_of
from tinygpt.params import HALVES

MOST_BYTES = 500_000_000  # of a file; a vocabulary of 250,000 takes 20 MB
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MOST_SHOWN, MOST_PROBLEMS = 60, 10  # characters of a value, problems of a file that messages show

# All keys that the library writes, and what is honoured exactly: a value, a type, an object, a list of objects.
# A vocabulary with all bytes leaves no text unknown, so options for unknown text are free; a ByteLevel post_processor
# or decoder changes no id. A key that is not listed may change ids one day, and is refused.
LEFT_OUT = object()  # the key is not there
FLAG = (False, True)
NOTHING = (None, LEFT_OUT)
LEVEL: dict[str, Any] = {
    "type": ("ByteLevel",),
    "add_prefix_space": FLAG,
    "trim_offsets": FLAG,
    "use_regex": (*FLAG, LEFT_OUT),
}
ADDED: dict[str, Any] = {  # text never becomes a special token, and keeps the spaces next to its name
    "id": (int,),
    "content": (str,),
    "single_word": (False,),
    "lstrip": (False,),
    "rstrip": (False,),
    "normalized": FLAG,  # there is no normalizer
    "special": (True,),
}
MODEL: dict[str, Any] = {
    "type": ("BPE", LEFT_OUT),  # GPT-2's has none
    "dropout": (*NOTHING, 0, 0.0),
    "unk_token": (*NOTHING, str),
    "continuing_subword_prefix": (*NOTHING, ""),
    "end_of_word_suffix": (*NOTHING, ""),
    "fuse_unk": (*NOTHING, *FLAG),
    "byte_fallback": (*NOTHING, *FLAG),
    "ignore_merges": (*NOTHING, False),
    "vocab": (dict,),
    "merges": (list,),
}
FILE: dict[str, Any] = {
    "version": ("1.0", LEFT_OUT),
    "truncation": NOTHING,
    "padding": NOTHING,
    "added_tokens": ([ADDED],),
    "normalizer": NOTHING,
    "pre_tokenizer": (LEVEL | {"add_prefix_space": (False,), "use_regex": (True, LEFT_OUT)},),
    "post_processor": (*NOTHING, LEVEL),
    "decoder": (LEVEL,),
    "model": (MODEL,),
}


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes: the byte itself if it is one, else the next from U+0100 on.

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
    """Write the file; the same arguments give the same bytes."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags} for name, i in sorted(special_tokens.items(), key=lambda kv: kv[1])
        ],
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

    Raises UserError with everything that is wrong with the file, including a missing special token `required`.
    """
    must_exist(path, stage="train_tokenizer")
    try:
        document = parse_json(read_file(path, MOST_BYTES), object_pairs_hook=each_once)
        problems = _problems("", document, FILE)
        merges = [] if problems else _pairs(document["model"]["merges"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    if problems:
        found = some_of(problems, MOST_PROBLEMS)
        raise UserError(f"{path} is not a byte-level BPE tokenizer.json like GPT-2's ({found})")
    vocab, added = document["model"]["vocab"], document["added_tokens"]
    special = {token["content"]: token["id"] for token in added}
    problems = _vocab_problems(vocab | special, merges, set(special)) + _special_problems(added, vocab)
    if required not in special:
        problems.append(f"the special token {required} is missing")
    if problems:
        raise UserError(f"{path}: {some_of(problems, MOST_PROBLEMS)}")
    return sorted(vocab | special, key=(vocab | special).__getitem__), merges, special


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges in one of the two spellings in use, "a b" or ["a", "b"].  Raises ValueError for others."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        is_pair = isinstance(pair, list) and [type(part) for part in pair] == [str, str]
        if not is_pair or type(merge) is not type(merges[0]) or pair[0].startswith("#version"):
            raise ValueError(f"model.merges contains {_shown(merge)}")
    return [(left, right) for left, right in pairs]


def _problems(name: str, value: Any, *allowed: Any) -> list[str]:
    """A message for every part of a value that is not one of the allowed values, types and objects."""
    fields = next((each for each in allowed if isinstance(each, dict)), None)
    if fields is not None and isinstance(value, dict):
        inner = {key: f"{name}.{key}".lstrip(".") for key in (*fields, *value)}
        return [
            p for key, place in inner.items() for p in _problems(place, value.get(key, LEFT_OUT), *fields.get(key, ()))
        ]
    if isinstance(value, list) and (items := [each[0] for each in allowed if isinstance(each, list)]):
        return [p for i, item in enumerate(value) for p in _problems(f"{name}[{i}]", item, items[0])]
    if any(type(value) is each or (type(value) is type(each) and value == each) for each in allowed):
        return []
    return [f"{name} is {_shown(value)}" if name else "it is not an object"]


def _shown(value: Any) -> str:
    """The beginning of a value as the file writes it."""
    text = "missing" if value is LEFT_OUT else json.dumps(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


def _special_problems(added: list[dict[str, Any]], vocab: dict[str, Any]) -> list[str]:
    """What the library would number or name differently in the special tokens, or mistake for text."""
    names = [token["content"] for token in added]
    both = [(token["id"], vocab[token["content"]]) for token in added if token["content"] in vocab]
    own = [token["id"] for token in added if token["content"] not in vocab]
    rules = {
        "added_tokens has a duplicate": len(set(names)) == len(names),
        "an id in added_tokens differs from that in model.vocab": all(type(i) is int and i == id for id, i in both),
        "the ids of added_tokens do not follow model.vocab's": own == [*range(len(vocab), len(vocab) + len(own))],
        "added_tokens has a single byte or an empty string": all(name and name not in CHAR_TO_BYTE for name in names),
        "added_tokens has half a character (a surrogate), such as \\ud800": not HALVES.search("".join(names)),
    }
    return [problem for problem, holds in rules.items() if not holds]


def _vocab_problems(vocab: dict[str, Any], merges: list[tuple[str, str]], special: set[str]) -> list[str]:
    problems = []
    ids = [*vocab.values()]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        problems.append(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    if missing := [char for char in BYTE_TO_CHAR if char not in vocab]:
        problems.append(f"{len(missing)} of the 256 bytes have no token")
    if foreign := [t for t in vocab if t not in special and not (t and set(t) <= CHAR_TO_BYTE.keys())]:
        problems.append(f"{len(foreign)} tokens are not byte-level, such as {shown(foreign[0])}")
    if unknown := [m for m in merges if any(part not in vocab or part in special for part in (*m, "".join(m)))]:
        problems.append(f"{len(unknown)} merges have unknown parts, such as {shown(' '.join(unknown[0]))}")
    return problems
