"""The `tokenizer.json` of the Hugging Face tokenizers library, read and written for byte-level BPE.

Format: https://huggingface.co/docs/tokenizers. A file that cannot be honoured exactly is refused. Tokens are written in
GPT-2's byte alphabet (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), which the library
calls `ByteLevel`.
"""

import json
from pathlib import Path
from typing import Any

from tinygpt.errors import UserError
from tinygpt.files import ANEW, each_once, must_exist, parse_json, read_file, some_of, write_text
from tinygpt.params import HALVES

MOST_BYTES = 500_000_000  # of a file; a vocabulary of 250,000 takes 20 MB
MOST_SHOWN, MOST_PROBLEMS = 60, 10  # characters of a value, problems of a file that messages show

# All keys that the library writes, and what is honoured exactly: a value, a type, an object, a list of objects. The
# first of them is what we write. A vocabulary with all bytes leaves no text unknown, so options for unknown text are
# free; a ByteLevel post_processor or decoder changes no id. A key that is not listed may change ids one day, and is
# refused.
LEFT_OUT = object()  # the key is not there
FLAG = (False, True)
NOTHING = (None, LEFT_OUT)
LEVEL: dict[str, Any] = {
    "type": ("ByteLevel",),
    "add_prefix_space": FLAG,
    "trim_offsets": (True, False),
    "use_regex": (True, False, LEFT_OUT),
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
    "fuse_unk": (*FLAG, *NOTHING),
    "byte_fallback": (*FLAG, *NOTHING),
    "ignore_merges": (False, *NOTHING),
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
    document = _first(FILE)
    document["added_tokens"] = [
        _first(ADDED) | {"id": i, "content": name} for name, i in sorted(special_tokens.items(), key=lambda kv: kv[1])
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    document["model"] |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    write_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def _first(fields: dict[str, Any]) -> dict[str, Any]:
    """An object with the first of the values that each field may have."""
    return {key: _first(first) if isinstance(first, dict) else first for key, (first, *_) in fields.items()}


def read_tokenizer_json(path: Path, *, required: str) -> tuple[list[str], list[tuple[str, str]], dict[str, int]]:
    """Return tokens in id order, merges in rank order, and special tokens.

    Raises UserError with everything that is wrong with the file, including a missing special token `required`.
    """
    must_exist(path, stage="train_tokenizer")
    try:
        document = parse_json(read_file(path, MOST_BYTES), object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {ANEW}") from None
    try:
        problems = _problems("", document, FILE) or _token_problems(document, required)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        found = some_of(problems, MOST_PROBLEMS)
        raise UserError(f"{path} is not a byte-level BPE tokenizer.json like GPT-2's ({found})")
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    ids = document["model"]["vocab"] | special
    return sorted(ids, key=ids.__getitem__), _pairs(document["model"]["merges"]), special


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
    text = "missing" if value is LEFT_OUT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


def _token_problems(document: dict[str, Any], required: str) -> list[str]:
    """What is wrong with tokens and merges, or what the library would number, name or read differently."""
    vocab, added, merges = document["model"]["vocab"], document["added_tokens"], _pairs(document["model"]["merges"])
    special = {token["content"]: token["id"] for token in added}
    tokens = vocab | special
    ids = [*tokens.values()]
    both = [(vocab[name], i) for name, i in special.items() if name in vocab]
    own = [i for name, i in special.items() if name not in vocab]
    missing = [char for char in BYTE_TO_CHAR if char not in tokens]
    foreign = [t for t in vocab if t not in special and not (t and set(t) <= CHAR_TO_BYTE.keys())]
    unknown = [m for m in merges if any(part not in tokens or part in special for part in (*m, "".join(m)))]
    rules = {
        f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once": (
            all(type(i) is int for i in ids) and sorted(ids) == [*range(len(ids))]
        ),
        f"{len(missing)} of the 256 bytes have no token": not missing,
        f"{len(foreign)} tokens are not byte-level, such as {_shown(foreign[:1])}": not foreign,
        f"{len(unknown)} merges have unknown parts, such as {_shown(unknown[:1])}": not unknown,
        "added_tokens has a duplicate": len(special) == len(added),
        "an id in added_tokens differs from that in model.vocab": all(type(a) is int and a == b for a, b in both),
        "the ids of added_tokens do not follow model.vocab's": own == [*range(len(vocab), len(vocab) + len(own))],
        "added_tokens has a single byte or an empty string": all(name and name not in CHAR_TO_BYTE for name in special),
        "added_tokens has half a character (a surrogate), such as \\ud800": not HALVES.search("".join(special)),
        f"the special token {required} is missing": required in special,
    }
    return [problem for problem, holds in rules.items() if not holds]
