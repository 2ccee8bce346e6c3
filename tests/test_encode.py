"""Encoding in bulk gives the ids of encoding one text after the other."""

import numpy as np
import pytest
from conftest import RUNTIME, TRICKY, prose
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt import encode
from tinygpt.corpus.folders import SPLITS, cut_lines, text_line
from tinygpt.encode import BulkEncoder, encode_corpus, save_ids
from tinygpt.tokenizer import Tokenizer
from tinygpt.tokenizer.json_format import byte_alphabet
from tinygpt.tokenizer.pretokenize import iter_blocks
from tinygpt.tokenizer.tokenizer import EOS


def one_by_one(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [i for text in texts for i in (tokenizer.eos_id, *tokenizer.encode(text))]


@given(texts=st.lists(TRICKY, max_size=4))
@settings(max_examples=200)
def test_encoding_in_bulk_gives_the_ids_of_encoding_one_by_one(tiny_tokenizer, texts):
    encoder = BulkEncoder(tiny_tokenizer)
    for _ in range(2):  # the second time from its cache
        ids = [int(i) for block in iter_blocks(texts) for i in encoder.encode(block)]
        assert ids == one_by_one(tiny_tokenizer, texts)


def test_a_full_table_starts_anew(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "MAX_PRETOKENS", 20)
    texts, encoder = [prose(50, seed=seed) for seed in range(5)], BulkEncoder(tiny_tokenizer)
    ids = [int(i) for text in texts for block in iter_blocks([text]) for i in encoder.encode(block)]
    assert ids == one_by_one(tiny_tokenizer, texts)


def test_a_file_of_ids_has_the_tokenizers_type_and_follows_another_tokenizer(tiny_tokenizer, tmp_path):
    large = Tokenizer([EOS, *byte_alphabet(), *(f"a{i}" for i in range(2**16))], [], {EOS: 0})
    texts = ["the file", "", "é"]
    (tmp_path / "texts.jsonl").write_text("".join(map(text_line, texts)))
    for name, tokenizer in [("a", tiny_tokenizer), ("b", large)]:
        tokenizer.save(tmp_path / name)
        save_ids(*cut_lines(tmp_path / "texts.jsonl"), tmp_path / f"{name}.ids", tokenizer=tmp_path / name)
        ids = np.fromfile(tmp_path / f"{name}.ids", tokenizer.dtype)
        assert ids.tolist() == one_by_one(tokenizer, texts)


def test_an_interrupted_stage_continues_after_the_splits_that_were_encoded(tiny_tokenizer, tmp_path, monkeypatch):
    tiny_tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "clean").mkdir()
    for split in SPLITS:
        (tmp_path / "clean" / f"{split}.jsonl").write_text(text_line(f"the file of {split}"))

    def encode_all() -> None:
        encode_corpus(tmp_path / "clean", tmp_path / "tokenizer", tmp_path / "tokens", RUNTIME, runs=tmp_path / "runs")

    write = encode.write_tokens

    def stop_at_test(path, parts, tokenizer):
        if path.stem == "test":
            raise KeyboardInterrupt
        return write(path, parts, tokenizer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "write_tokens", stop_at_test)
        encode_all()
    with monkeypatch.context() as patch:
        patch.setattr(encode, "save_ids", print)  # which would leave no file: nothing is left to encode
        encode_all()
    assert not [*(tmp_path / "runs").glob("encode-*-*")]
