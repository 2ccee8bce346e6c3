"""The tokenizer, compared with the tokenizers library."""

import json
import random

import pytest
import tokenizers
from conftest import prose
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinygpt.errors import UserError
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.json_format import byte_alphabet, to_bytes, to_token
from tinygpt.tokenizer.tokenizer import EOS


def reference_training(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    return reference


def merges_of(reference: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(reference.to_str())["model"]["merges"]]


@pytest.mark.parametrize("seed", range(3))
def test_training_finds_the_merges_of_the_tokenizers_library(seed):
    texts = prose(5000, seed=seed).split("\n")
    reference = reference_training(texts, 450)
    ours = train_bpe(texts, 450)
    assert ours.merges == merges_of(reference)
    assert {token: i for i, token in enumerate(ours.tokens)} == reference.get_vocab()


def test_training_breaks_ties_and_overlaps_as_the_tokenizers_library_does():
    rng = random.Random(0)
    for _ in range(60):
        texts = ["".join(rng.choice("aab b\n") for _ in range(rng.randint(1, 50))) for _ in range(4)]
        reference = reference_training(texts, 275)
        if reference.get_vocab_size() > 257:
            assert train_bpe(texts, reference.get_vocab_size()).merges == merges_of(reference)


def test_the_example_of_the_articles_on_byte_pair_encoding():
    # "aaabdaaabac" from https://en.wikipedia.org/wiki/Byte_pair_encoding: merges aa, then ab, then aaab
    tokenizer = train_bpe(["aaabdaaabac"], 257 + 3)
    assert tokenizer.merges == [("a", "a"), ("a", "b"), ("aa", "ab")]
    assert [tokenizer.tokens[i] for i in tokenizer.encode("aaabdaaabac")] == ["aaab", "d", "aaab", "a", "c"]


def test_order_of_documents_does_not_matter():
    texts = prose(3000).split("\n")
    assert train_bpe(texts, 400).merges == train_bpe(texts[::-1], 400).merges


def test_min_frequency_stops_early_and_too_little_text_is_reported():
    with pytest.raises(UserError, match=r"gives only 259 of 300 tokens: set tokenizer.vocab_size=259"):
        train_bpe(["abab cdcd"], 300, min_frequency=2)  # ab and cd; abab occurs once
    with pytest.raises(UserError, match=r"only 257 of 300 tokens: .*=257, lower .*=2, or learn from more text"):
        train_bpe([], 300, min_frequency=2)
    with pytest.raises(UserError, match=r"=259, or learn from more text .download.source, tokenizer.max_bytes"):
        train_bpe(["abab"], 300, min_frequency=1)


@pytest.fixture(scope="module")
def reference(tiny_tokenizer, tmp_path_factory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.encode_special_tokens = True  # as for us, a special token's name in a text is text
    return found


def test_long_repeats_and_long_words_are_encoded(tiny_tokenizer, reference):
    for text in ("^" * 10_000, "the" * 5_000, " " * 3_000, "\n" * 1_000 + "a", "x " * 2_000):
        assert tiny_tokenizer.encode(text) == reference.encode(text).ids


def test_a_special_token_is_never_made_from_text(tiny_tokenizer):
    ids = tiny_tokenizer.encode(f"a{EOS}b<|user|>")
    assert not set(ids) & set(tiny_tokenizer.special_tokens.values())
    assert tiny_tokenizer.decode(ids) == f"a{EOS}b<|user|>"
    assert tiny_tokenizer.special_tokens == {EOS: 0, "<|user|>": 1}
    assert tiny_tokenizer.decode([tiny_tokenizer.eos_id]) == EOS


def test_half_a_character_decodes_to_the_replacement_character(tiny_tokenizer):
    half = tiny_tokenizer.encode("😀")[:-1]
    assert tiny_tokenizer.decode(half) in ("�", "��", "���")
    assert tiny_tokenizer.decode_bytes(tiny_tokenizer.encode("😀")) == "😀".encode()


def test_a_lone_surrogate_becomes_the_replacement_character(tiny_tokenizer):
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("ids", [[-1], [300], [0, 10**9]])
def test_ids_out_of_range_are_refused(tiny_tokenizer, ids):
    with pytest.raises(ValueError, match="ids must be from 0 to 299, found (-1|300|1000000000)$"):
        tiny_tokenizer.decode(ids)


def test_empty_texts_are_encoded(tiny_tokenizer):
    assert tiny_tokenizer.encode("") == []
    assert tiny_tokenizer.decode([]) == ""


def test_saving_and_loading_gives_the_same_tokenizer_and_the_same_bytes(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert (loaded.tokens, loaded.merges, loaded.special_tokens) == (
        tiny_tokenizer.tokens,
        tiny_tokenizer.merges,
        tiny_tokenizer.special_tokens,
    )
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").encode(prose(50)) == tiny_tokenizer.encode(prose(50))


def test_the_byte_alphabet_is_the_one_of_the_tokenizers_library():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert to_token(b" the\n") == "ĠtheĊ"
    assert to_bytes(to_token(bytes(range(256)))) == bytes(range(256))


def broken(document: dict, path: tuple, value: object) -> dict:
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("model", "type"),
            "Unigram",
            """is not a byte-level BPE tokenizer.json like GPT-2's .model.type is "Unigram".$""",
        ),
        (("model", "merges"), [["a", "zzz"]], "1 merges have unknown parts"),
        (("model", "vocab", "a"), 5_000, "are not 0 to"),
        (("model", "vocab", "a"), True, "are not 0 to"),
        (("model", "vocab"), {}, "of the 256 bytes have no token"),
        (("model", "vocab", "⚠"), 300, r'not byte-level, such as \["⚠"'),
        (("normalizer",), {"type": "NFC"}, """normalizer is {"type": "NFC"}"""),
        (("pre_tokenizer", "add_prefix_space"), True, "pre_tokenizer.add_prefix_space is true"),
        (("pre_tokenizer",), None, "pre_tokenizer is null"),
        (("pre_tokenizer",), "ByteLevel", 'pre_tokenizer is "ByteLevel"'),
        (("model", "ignore_merges"), True, "model.ignore_merges is true"),
        (("added_tokens",), [], r"the special token <.endoftext.> is missing"),
        (("added_tokens",), 7, "added_tokens is 7"),
        (("added_tokens", 0, "special"), False, r"added_tokens\[0\].special is false"),
        (("added_tokens", 1, "content"), "a", "added_tokens has a single byte"),
        (("added_tokens", 1, "content"), "\ud800x", "added_tokens has half a character"),
        (("model", "vocab", "<|endoftext|>"), 300, "an id in added_tokens differs from that in model.vocab"),
        (("future",), {}, "future is {}"),
        (("model", "merges"), ["abc"], "is not a byte-level BPE tokenizer.json"),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused(tiny_tokenizer, tmp_path, path, value, message):
    tiny_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(broken(json.loads(file.read_text()), path, value)))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_lost_merges_repeated_tokens_and_absurd_sizes_are_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    document = json.loads(whole)
    del document["model"]["merges"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"is not a byte-level BPE tokenizer.json .*model.merges is missing"):
        load_tokenizer(tmp_path)
    assert whole.count('"vocab": {') == 1
    file.write_text(whole.replace('"vocab": {', '"vocab": {"a": 299,'))
    with pytest.raises(UserError, match='the key "a" occurs twice'):
        load_tokenizer(tmp_path)
    with open(file, "r+b") as big:
        big.truncate(2_000_000_000)  # a sparse file, which takes no space
    with pytest.raises(UserError, match=r"tokenizer.json is not .* more than the limit of 500.0 MB"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    found = "a byte-level BPE" if text == "[]" else "valid JSON .*: copy it again, or run `dvc repro`"
    with pytest.raises(UserError, match=f"tokenizer.json is not {found}"):
        load_tokenizer(tmp_path)
