"""Token files: what was written is read back, and anything else is refused."""

import dataclasses
import itertools
import json
import random
import re

import numpy as np
import pytest

from tinygpt.encode import write_tokens
from tinygpt.errors import UserError
from tinygpt.files import sha256_file, write_json
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import byte_alphabet
from tinygpt.tokenizer.tokenizer import EOS
from tinygpt.tokens import TokensMeta, load_meta, load_tokens

DOCUMENTS = ["the first", "the sécond", ""]


def ids_of(documents, tokenizer):
    return [np.array([tokenizer.eos_id, *tokenizer.encode(text)], tokenizer.dtype) for text in documents]


def write_folder(folder, tokenizer):
    splits = {
        name: write_tokens(folder / f"{name}.bin", ids_of(documents, tokenizer), tokenizer)
        for name, documents in [("train", DOCUMENTS), ("val", ["x"]), ("test", [])]
    }
    meta = TokensMeta(
        dtype=tokenizer.dtype.str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256="0" * 64,
        **splits,
    )
    write_json(folder / "meta.json", dataclasses.asdict(meta))
    return meta


def test_documents_are_joined_and_enclosed_by_the_end_of_text(tiny_tokenizer, tmp_path):
    meta = write_folder(tmp_path, tiny_tokenizer)
    assert load_meta(tmp_path) == meta
    ids = load_tokens(tmp_path, "train").tolist()
    assert tiny_tokenizer.decode(ids) == f"{EOS}the first{EOS}the sécond{EOS}{EOS}"
    assert ids[0] == ids[-1] == tiny_tokenizer.eos_id
    assert (meta.train.documents, meta.train.bytes, meta.train.tokens) == (3, 9 + 11, len(ids))


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    tokenizer = Tokenizer([EOS, *byte_alphabet(), *(f"a{i}" for i in range(2**16 - 256))], [], {EOS: 0})
    write_folder(tmp_path, tokenizer)
    assert tokenizer.vocab_size == 2**16 + 1
    assert (Tokenizer.from_merges([]).dtype.str, tokenizer.dtype.str) == ("<u2", "<u4")
    assert load_tokens(tmp_path, "train").dtype == np.uint32
    assert tokenizer.decode(load_tokens(tmp_path, "val")) == f"{EOS}x{EOS}"


def test_tokens_of_another_tokenizer_are_refused_where_the_tokenizer_is_named(tiny_tokenizer, tmp_path):
    meta = write_folder(tmp_path, tiny_tokenizer)
    tiny_tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"was not made with the tokenizer in .*: run `dvc repro encode`"):
        load_meta(tmp_path, tokenizer=tmp_path)
    meta = dataclasses.replace(meta, tokenizer_sha256=sha256_file(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "meta.json", dataclasses.asdict(meta))
    assert load_meta(tmp_path, tokenizer=tmp_path) == meta


def test_mapped_tokens_cannot_be_written(tiny_tokenizer, tmp_path):
    write_folder(tmp_path, tiny_tokenizer)
    with pytest.raises(ValueError, match="read-only"):
        load_tokens(tmp_path, "train")[0] = 1


def test_too_few_tokens_are_reported_with_the_params_to_change(tiny_tokenizer, tmp_path):
    write_folder(tmp_path, tiny_tokenizer)
    with pytest.raises(UserError, match=r"test.bin has 0 tokens, at least 1 .*a larger clean.test_fraction"):
        load_tokens(tmp_path, "test")
    with pytest.raises(UserError, match=r"at least 1000 are needed: use more text or a smaller model.block_size"):
        load_tokens(tmp_path, "train", at_least=1000)


def test_missing_and_foreign_files_are_reported(tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"meta.json not found: run `dvc repro encode`"):
        load_tokens(tmp_path, "train")
    write_folder(tmp_path, tiny_tokenizer)
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["eos_id"], meta["val"]["bytes"]
    write_json(tmp_path / "meta.json", meta)
    with pytest.raises(UserError, match=r"was written by another version .missing key eos_id; missing key val"):
        load_meta(tmp_path)


def test_an_id_that_is_not_in_the_vocabulary_is_refused_wherever_it_is(tiny_tokenizer, tmp_path):
    meta = write_folder(tmp_path, tiny_tokenizer)
    ids = np.fromfile(tmp_path / "train.bin", "<u2")
    for place in (0, 9, len(ids) - 1):
        wrong = ids.copy()
        wrong[place] = 300
        wrong.tofile(tmp_path / "train.bin")
        train = dataclasses.replace(meta.train, sha256=sha256_file(tmp_path / "train.bin"))
        write_json(tmp_path / "meta.json", dataclasses.asdict(dataclasses.replace(meta, train=train)))
        with pytest.raises(UserError, match=r"train.bin does not fit meta.json: run `dvc repro -f -s encode`"):
            load_tokens(tmp_path, "train")
        assert len(load_tokens(tmp_path, "val"))


def test_a_vocabulary_of_another_size_than_the_tokenizers_is_refused(tiny_tokenizer, tmp_path):
    meta = write_folder(tmp_path, tiny_tokenizer)
    tiny_tokenizer.save(tmp_path)
    sha256 = sha256_file(tmp_path / "tokenizer.json")
    write_json(tmp_path / "meta.json", dataclasses.asdict(meta) | {"tokenizer_sha256": sha256, "vocab_size": 2**16})
    with pytest.raises(UserError, match=r"was not made with the tokenizer"):
        load_meta(tmp_path, tokenizer=tmp_path)


ODD = [None, True, -1, 0, 1.5, 2**31, 2**63, 2**70, 1e308, "", "O", ">u2", "<u8", "<f4", "V2", [], [3], {}, {"a": 1}]


def test_whatever_meta_json_says_the_tokens_are_right_or_refused(tiny_tokenizer, tmp_path):
    right = dataclasses.asdict(write_folder(tmp_path, tiny_tokenizer))
    ids, refused = load_tokens(tmp_path, "train").tolist(), 0
    places = [(right, key) for key in right] + [(right["train"], key) for key in right["train"]]
    for (holder, key), value in itertools.product(places, ODD):
        kept, holder[key] = holder[key], value
        (tmp_path / "meta.json").write_text(json.dumps(right))
        try:
            assert load_tokens(tmp_path, "train").tolist() == ids, (key, value)
        except UserError as error:
            assert re.search("run `dvc repro (-f -s )?encode`", str(error)) and len(str(error)) < 500
            refused += 1
        holder[key] = kept
    assert refused > 100


def test_damaged_files_give_the_same_ids_or_are_refused(tiny_tokenizer, tmp_path):
    write_folder(tmp_path, tiny_tokenizer)
    ids, rng = load_tokens(tmp_path, "train").tolist(), random.Random(0)
    for name in ["meta.json"] * 150 + ["train.bin"] * 50:
        raw = bytearray((tmp_path / name).read_bytes())
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        try:
            assert load_tokens(tmp_path, "train").tolist() == ids
        except UserError as error:
            assert "encode" in str(error) and "\n" not in str(error).replace("\n       ", "")
        write_folder(tmp_path, tiny_tokenizer)
