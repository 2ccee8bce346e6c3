"""Every kind of tokenizer: the same ids in the tokenizers library and in llama.cpp, and no text is lost."""

import dataclasses
import json
import shutil

import pytest
import tokenizers
from conftest import RUNTIME, TRICKY, prose, tiny_config
from hypothesis import given, settings
from project import ROOT, run_stages, set_params
from transformers import AutoTokenizer

from tinygpt.corpus.folders import text_line
from tinygpt.encode import BulkEncoder
from tinygpt.errors import UserError
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.generate import Sampling, stream
from tinygpt.generate.lean import LeanGPT
from tinygpt.model.gpt import GPT
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.json_format import to_token
from tinygpt.tokenizer.kinds import (
    TOKENIZERS,
    TokenizerParams,
    build_tokenizer,
    expected_size,
    learn_tokenizer,
    take_tokenizer,
)
from tinygpt.tokenizer.pretokenize import count_pretokens, iter_blocks
from tinygpt.tokenizer.tokenizer import BEGIN, EOS, PAD, UNKNOWN

PARAMS = TokenizerParams(
    kind="bpe", from_file=None, vocab_size=400, min_frequency=1, max_bytes=None, special_tokens=(BEGIN, PAD, UNKNOWN)
)
TEXT = prose(400) + " 😀 é "


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request) -> Tokenizer:
    return learn_tokenizer(count_pretokens([TEXT]), dataclasses.replace(PARAMS, kind=request.param))


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A folder for transformers and a GGUF file of a model with that vocabulary."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save(folder / "tokenizer")
    model = GPT(tiny_config(vocab_size=tokenizer.vocab_size))
    export_hf(model, tokenizer, folder / "tokenizer", folder / "hf")
    export_gguf(model, tokenizer, folder / "model.gguf", "f32")
    return folder


@pytest.fixture(scope="module")
def readers(exported):
    """The exported tokenizer in the tokenizers library and in llama.cpp."""
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer/tokenizer.json"))
    theirs.encode_special_tokens = True  # as for us, a special token's name in a text is text
    with LlamaCpp(exported / "model.gguf") as llama:
        yield theirs, llama


@given(text=TRICKY)
@settings(max_examples=150)
def test_the_same_ids_everywhere_and_back_to_the_text(tokenizer, readers, text):
    theirs, llama = readers
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert theirs.encode(text).ids == ids
    assert llama.encode(text) == ids


def test_roles_of_special_tokens_reach_transformers_and_llama_cpp(tokenizer, exported):
    theirs = AutoTokenizer.from_pretrained(exported / "hf")
    assert (theirs.bos_token, theirs.eos_token) == (BEGIN, EOS)
    assert (theirs.pad_token, theirs.unk_token) == (PAD, UNKNOWN)
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.unk_token_id == tokenizer.unk_id
    config = json.loads((exported / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"]) == (tokenizer.bos_id, tokenizer.pad_id)
    with LlamaCpp(exported / "model.gguf") as llama:
        assert llama.eog_ids() == [tokenizer.eos_id]
    assert not set(tokenizer.encode(f"{EOS}{BEGIN}{PAD}{UNKNOWN}")) & set(tokenizer.special_tokens.values())


def test_begin_comes_before_each_document_and_each_generated_text(tokenizer, monkeypatch):
    block = b"".join(iter_blocks(["the", "file"]))
    ids = BulkEncoder(tokenizer).encode(block).tolist()
    assert tokenizer.decode(ids) == f"{EOS}{BEGIN}the{EOS}{BEGIN}file"
    plain = Tokenizer.from_merges(tokenizer.merges)
    assert plain.bos_id == plain.eos_id
    assert (plain.pad_id, plain.unk_id) == (None, None)
    assert plain.decode(BulkEncoder(plain).encode(block).tolist()) == f"{EOS}the{EOS}file"
    model = GPT(tiny_config(vocab_size=tokenizer.vocab_size)).eval()
    seen, logits = [], LeanGPT.logits
    monkeypatch.setattr(
        LeanGPT, "logits", lambda self, ids, *rest: seen.append(ids.tolist()) or logits(self, ids, *rest)
    )
    [*stream(model, tokenizer, "the", max_new_tokens=1, sampling=Sampling())]
    assert seen[0] == [tokenizer.bos_id, *tokenizer.encode("the")]


def test_each_byte_is_a_token_and_so_is_each_character():
    counts = count_pretokens([TEXT])
    as_bytes = learn_tokenizer(counts, dataclasses.replace(PARAMS, kind="byte"))
    assert as_bytes.vocab_size == 256 + 4
    assert len(as_bytes.encode("né中😀")) == 1 + 2 + 3 + 4
    as_chars = learn_tokenizer(counts, dataclasses.replace(PARAMS, kind="char"))
    assert {len(as_chars.encode(character)) for character in set(TEXT)} == {1}
    assert len(as_chars.encode("the 中文😀é")) == 8
    assert len(as_chars.encode("ű")) == 2  # not in the text: its bytes


def test_a_new_kind_is_a_function_and_an_entry(tmp_path, monkeypatch):
    def learn_words(counts, vocab_size, *, min_frequency, special_tokens):
        """Learn the most frequent pretoken and its beginnings."""
        token = to_token(max(counts, key=counts.__getitem__))
        merges = [(token[:end], token[end]) for end in range(1, len(token))]
        return Tokenizer.from_merges(merges[: vocab_size - 257], special_tokens)

    monkeypatch.setitem(TOKENIZERS, "words", learn_words)
    (tmp_path / "train.jsonl").write_text(text_line("to be or not to be, to be"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    params = dataclasses.replace(PARAMS, kind="words", special_tokens=())
    made = build_tokenizer(params, tmp_path, RUNTIME)
    assert [made.decode([i]) for i in made.encode("to be, be")] == ["t", "o", " be", ",", " be"]


def test_where_there_is_no_room_the_rarer_characters_stay_bytes():
    counts = count_pretokens(["éééé 中中 😀"])
    small = dataclasses.replace(PARAMS, kind="char", special_tokens=(), vocab_size=257 + 1)
    assert learn_tokenizer(counts, small).tokens[257:] == ["Ã©"]
    chars = learn_tokenizer(counts, dataclasses.replace(small, vocab_size=257 + 3))
    assert [len(chars.encode(c)) for c in "é中😀"] == [1, 1, 4]
    alike = learn_tokenizer(count_pretokens(["文斐"]), dataclasses.replace(small, vocab_size=257 + 3))
    assert [len(alike.encode(c)) for c in "文斐"] == [1, 1]  # they share the token of their first two bytes
    frequent = learn_tokenizer(counts, dataclasses.replace(small, vocab_size=400, min_frequency=2))
    assert [len(frequent.encode(c)) for c in "é中😀"] == [1, 1, 4]


def test_among_equally_frequent_characters_the_order_of_the_text_does_not_matter():
    params = dataclasses.replace(PARAMS, kind="char", special_tokens=(), vocab_size=257 + 3)
    one, other = (learn_tokenizer(count_pretokens([text]), params) for text in ("中 é 文", "文 é 中"))
    assert one.tokens == other.tokens


def test_the_number_of_tokens_is_known_before_they_are_learned_and_that_of_characters_afterwards(tmp_path):
    kinds = {kind: dataclasses.replace(PARAMS, kind=kind) for kind in TOKENIZERS}
    assert {kind: expected_size(params, tmp_path) for kind, params in kinds.items()} == (
        {"bpe": 400, "char": 400, "byte": 260}
    )
    made = learn_tokenizer(count_pretokens([TEXT]), kinds["char"])
    made.save(tmp_path)
    assert 260 < made.vocab_size < 400
    assert {kind: expected_size(params, tmp_path) for kind, params in kinds.items()} == (
        {"bpe": 400, "char": made.vocab_size, "byte": 260}
    )
    assert expected_size(dataclasses.replace(kinds["char"], vocab_size=261), tmp_path) == 261
    assert expected_size(dataclasses.replace(kinds["bpe"], from_file=str(tmp_path)), tmp_path) == made.vocab_size


def test_a_ready_tokenizer_keeps_its_ids(tmp_path):
    # GPT-2's own file: bytes first, <|endoftext|> last, merges as strings, neither `version` nor the model's `type`
    ours = learn_tokenizer(count_pretokens([TEXT]), dataclasses.replace(PARAMS, special_tokens=()))
    tokens = [*ours.tokens[1:], EOS]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document = {
        "added_tokens": [{"id": len(tokens) - 1, "content": EOS, **plain, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in ours.merges],
        },
    }
    file = tmp_path / "gpt2.json"
    file.write_text(json.dumps(document))
    params = dataclasses.replace(PARAMS, from_file=str(file), special_tokens=())
    taken = take_tokenizer(params)
    assert taken.eos_id == len(tokens) - 1
    assert taken.encode(TEXT) == [i - 1 for i in ours.encode(TEXT)]
    taken.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == taken.encode(TEXT)
    with pytest.raises(UserError, match=r"tokenizer.special_tokens names <\|pad\|>, which .*gpt2.json does not have"):
        take_tokenizer(dataclasses.replace(params, special_tokens=(PAD,)))
    with pytest.raises(UserError, match=r"tokenizer.from_file=.*none.json not found"):
        take_tokenizer(dataclasses.replace(params, from_file=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match=r"tokenizer.from_file=.*folder not found: give the path"):
        (tmp_path / "folder").mkdir()
        take_tokenizer(dataclasses.replace(params, from_file=str(tmp_path / "folder")))


def test_the_stage_learns_from_max_bytes_alone_or_takes_a_file(tmp_path, monkeypatch):
    texts = [f"{letter * (300 + 2 * i)} end" for i, letter in enumerate("abcdefgh")]
    file = tmp_path / "data/clean/train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(map(text_line, texts)))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_params(tmp_path, {"tokenizer.vocab_size": 259, "tokenizer.min_frequency": 1, "tokenizer.max_bytes": 700})
    taken = [*texts[:2], texts[2][: 700 - len(texts[0]) - len(texts[1])]]
    run_stages("train_tokenizer", tmp_path)
    assert load_tokenizer(tmp_path / "data/tokenizer").merges == train_bpe(taken, 259).merges
    assert train_bpe(taken, 259).merges != train_bpe(texts, 259).merges
    checkout = tmp_path / "checkout"  # where a file that git does not track is, when DVC runs a temporary copy
    load_tokenizer(tmp_path / "data/tokenizer").save(checkout / "own")
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    set_params(tmp_path, {"tokenizer.from_file": "own/tokenizer.json"})
    run_stages("train_tokenizer", tmp_path)
    assert load_tokenizer(tmp_path / "data/tokenizer").merges == train_bpe(taken, 259).merges
