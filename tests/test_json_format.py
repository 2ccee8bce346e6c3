"""With each field of a tokenizer.json we get the same ids as the tokenizers library, or refuse the field by name."""

import contextlib
import copy
import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import FUZZ, prose
from test_tokenizer import broken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tinygpt.errors import UserError
from tinygpt.tokenizer import load_tokenizer

ODD = [
    None,
    True,
    False,
    0,
    1,
    0.0,
    0.5,
    -1,
    2**70,
    "",
    "x",
    "Ġ",
    "<|user|>",
    "\x1b[2J",
    [],
    {},
    [None],
    {"type": "ByteLevel"},
]
ARGUMENTS = [(), ("a",), ("a", "b"), (" ", "isolated"), ([],), (5,), ("a", 1, 1), (("<|user|>", 1), ("<|user|>", 1))]
TEXTS = (
    prose(60),
    "  a  b\n\n c\t\t ",
    "naïve 中文 👩🏽 e\u0301 \u2003x",
    "It's we'LL 12345 ...!?",
    "",
    " ",
    "\x00\u200bA",
)


def kinds_of(module: Any, part: str) -> Iterator[Any]:
    """The JSON that the library writes for each class allowed in a part of the file."""
    for cls in [getattr(module, name) for name in dir(module) if isinstance(getattr(module, name), type)]:
        for arguments in ARGUMENTS:
            try:
                holder = HFTokenizer(models.BPE())
                setattr(holder, part, cls(*arguments))
            except Exception:  # the class needs other arguments, or is not for this part
                continue
            yield json.loads(holder.to_str())[part]
            break


def full_values() -> dict[str, list[Any]]:
    """All kinds of complete values, by field."""
    holder = HFTokenizer(models.BPE())
    holder.enable_truncation(5)
    holder.enable_padding(length=50)
    limits = json.loads(holder.to_str())
    template = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    holder.post_processor = template
    found = {
        "truncation": [limits["truncation"]],
        "padding": [limits["padding"]],
        "normalizer": [*kinds_of(normalizers, "normalizer")],
        "pre_tokenizer": [*kinds_of(pre_tokenizers, "pre_tokenizer")],
        "post_processor": [json.loads(holder.to_str())["post_processor"], *kinds_of(processors, "post_processor")],
        "decoder": [*kinds_of(decoders, "decoder")],
    }
    assert [len(found[name]) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")] > [10, 10, 4, 8]
    return found


def fields_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each field; of very many, as in vocab and merges, only the first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in [*inner][:20]:
        yield (*path, key)
        yield from fields_of(one, (*path, key))


def taken(file: Path, document: Any) -> bool:
    """Whether a file is accepted.  If so, the library must give the same ids; if not, the error must be one line."""
    file.write_text(json.dumps(document))
    try:
        ours = load_tokenizer(file)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return False
    theirs = HFTokenizer.from_file(str(file))
    assert ours.special_tokens == {name: theirs.token_to_id(name) for name in ours.special_tokens}
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    return True


def test_each_field_of_the_format_is_done_exactly_or_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    sound, whole = file.read_text(), full_values()
    assert taken(file, json.loads(sound))
    n_taken = 0
    for path in fields_of(json.loads(sound)):
        for value in [*ODD, *whole.get(str(path[-1]), [])]:
            n_taken += taken(file, broken(json.loads(sound), path, value))
        document = json.loads(sound)
        inner = functools.reduce(lambda value, key: value[key], path[:-1], document)
        del inner[path[-1]]
        taken(file, document)
        if isinstance(inner, dict):
            assert not taken(file, broken(json.loads(sound), (*path[:-1], "future"), 1))
    assert n_taken > 40


def test_several_odd_fields_and_damaged_bytes_are_done_exactly_or_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    file, rng = tmp_path / "tokenizer.json", random.Random(0)
    sound, whole = file.read_text(), full_values()
    paths = [path for path in fields_of(json.loads(sound)) if len(path) < 4]
    for _ in range(round(150 * FUZZ)):
        document = json.loads(sound)
        for path in rng.sample(paths, 3):
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change removed its parent
                broken(document, path, copy.deepcopy(rng.choice([*ODD, *whole.get(str(path[-1]), [])])))
        taken(file, document)
        damaged = bytearray(sound.encode())
        for _ in range(rng.choice([1, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        with contextlib.suppress(UserError):
            load_tokenizer(file)


def test_each_spelling_of_merges_is_read(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    pairs = document["model"]["merges"]
    assert taken(file, broken(document, ("model", "merges"), [" ".join(pair) for pair in pairs]))
    assert taken(file, broken(document, ("model", "merges"), [*pairs[5:], *pairs[:9]]))  # another order, some twice
    assert not taken(file, broken(document, ("model", "merges"), [" ".join(pairs[0]), *pairs[1:]]))
    assert not taken(file, broken(document, ("model", "merges"), ["#version: 0.2", *map(" ".join, pairs)]))
    assert not taken(file, broken(document, ("model", "merges"), [[1, 2]]))
