"""A hundred thousand strings get the same ids here, in the tokenizers library and in llama.cpp."""

import random
import sys
import unicodedata

import pytest
import tokenizers
from conftest import prose, tiny_config

from tinygpt.encode import BulkEncoder
from tinygpt.export.gguf import export_gguf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.model.gpt import GPT
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.pretokenize import iter_blocks

SPACES = [*" \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000", "  ", "\n\n", " \n "]
WORDS = "'s 't 're 've 'm 'll 'd 'S ' ’s don't O'Neil''s the The of ing 1 23 ½ Ⅷ ٣ १ 七 x=y; ... -> </s> <unk>".split()
MARKS = [*"\u0301\u0308\u093f\u200b\u200c\u200d\ufeff\ufe0f\u202e\x00\x01\x1c\x1d\x1e\x1f\x7f", "👩🏽\u200d🚀", "🇩🇪"]
SCRIPTS = "naïve Straße İı ǅ Привет κόσμε 你好 世界。 こんにちは 안녕 مرحبا שלום नमस्ते ไทย 𝔘𐍈".split()


def assigned() -> list[str]:
    """Every character that this Python's Unicode knows, which is not newer than the others'."""
    return [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


def strings(n: int) -> list[str]:
    rng = random.Random(0)
    kinds = [SPACES, WORDS, MARKS, SCRIPTS, assigned()]

    def one() -> str:
        if rng.random() < 0.002:
            return rng.choice([*SPACES, "a", "'s", "7", "é", "-", "中"]) * rng.randint(100, 3000)
        return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 12)))

    return [one() for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([prose(2000), *strings(3000)], 1500)


@pytest.mark.slow
def test_a_hundred_thousand_strings_have_the_same_ids_everywhere(tokenizer, tmp_path):
    texts = strings(100_000)
    blocks, encoder = iter_blocks(texts), BulkEncoder(tokenizer)
    ours: list[list[int]] = []
    for i in (int(i) for block in blocks for i in encoder.encode(block)):
        if i == tokenizer.eos_id:
            ours.append([])
        else:
            ours[-1].append(i)
    assert [tokenizer.decode(ids) for ids in ours] == texts
    assert [*map(tokenizer.encode, texts[::20])] == ours[::20]  # one by one, which is much slower
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [found.ids for found in theirs.encode_batch_fast(texts)] == ours
    export_gguf(GPT(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "x.gguf", "f32")
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        assert [text for text, ids in zip(texts, ours, strict=True) if llama.encode(text) != ids] == []
