"""Real llama.cpp through its C API."""

import ctypes
import os
import random
import struct

import numpy as np
import pytest
import xllamacpp
from conftest import FAMILIES, FUZZ, tiny_model

from tinygpt.errors import UserError
from tinygpt.export.gguf import export_gguf
from tinygpt.export.llamacpp import N_BATCH, ContextParams, LlamaCpp, open_gguf, open_library


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(tiny_model(vocab_size=tiny_tokenizer.vocab_size, block_size=N_BATCH + 100), tiny_tokenizer, path, "f32")
    return path


def test_logits_do_not_depend_on_how_a_sequence_is_cut_into_batches(gguf):
    ids = np.random.default_rng(0).integers(0, 256, N_BATCH + 50).tolist()
    with LlamaCpp(gguf) as llama:
        whole, beginning = llama.logits(ids), llama.logits(ids[:20])
    assert whole.shape == (len(ids), llama.vocab_size)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[:20], beginning, atol=1e-5)


def test_greedy_with_the_cache_chooses_what_the_whole_sequence_gives(gguf):
    with LlamaCpp(gguf) as llama:
        new = llama.greedy([5, 6, 7], 20)
        logits = llama.logits([5, 6, 7, *new])
    assert new == logits[2:-1].argmax(-1).tolist()


def test_a_sequence_past_the_context_is_refused_where_llama_cpp_would_abort(gguf):
    with LlamaCpp(gguf, n_ctx=8) as llama:
        llama.greedy([1] * 5, 4)
        with pytest.raises(ValueError, match="9 tokens, but the context is 8"):
            llama.greedy([1] * 5, 5)
        with pytest.raises(ValueError, match="0 tokens"):
            llama.logits([])
        with pytest.raises(ValueError, match="token ids"):
            llama.logits([llama.vocab_size])


def test_texts_become_the_same_tokens(gguf, tiny_tokenizer):
    text = "the naïve <|endoftext|> 🙂\x00"
    with LlamaCpp(gguf) as llama:
        assert llama.encode(text) == tiny_tokenizer.encode(text)
        assert llama.decode_bytes(llama.encode(text)) == text.encode()
        assert llama.encode("") == []
        assert llama.eog_ids() == [tiny_tokenizer.eos_id]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "failed to read"),
        (lambda data: b"not a gguf file" * 10, "magic"),
        (lambda data: data[: len(data) // 2], "not within the file bounds"),
        (lambda data: data[:2000], "failed to read"),
        (lambda data: data.replace(b"llama.context_length", b"llama.context_lengtH"), "key not found in model"),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_Q.weight"), "not found"),
    ],
)
def test_a_damaged_file_is_a_user_error_with_the_reason(gguf, tmp_path, damage, reason, capfd):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(gguf.read_bytes()))
    with pytest.raises(UserError, match=rf"llama.cpp cannot load {path} \(.*{reason}"):
        LlamaCpp(path)
    assert capfd.readouterr() == ("", "")  # llama.cpp's own log is silent


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        LlamaCpp(tmp_path / "none.gguf")


def test_another_version_of_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(xllamacpp, "__version__", "2027.1.1")
    with pytest.raises(UserError, match=r"xllamacpp 2027\.1\.1 .*`pip install xllamacpp==2026"):
        open_library.__wrapped__()


def test_the_structs_have_the_fields_of_the_pinned_build_at_their_places():
    model, context = open_library().llama_model_default_params(), open_library().llama_context_default_params()
    assert (model.n_gpu_layers, model.split_mode, model.load_mode, model.main_gpu) == (-1, 1, -1, 0)
    assert model.use_extra_bufts
    expected = {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4,
        "rope_scaling_type": -1, "flash_attn_type": -1, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1,
        "type_v": 1, "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
        "n_samplers": 0,
    }  # fmt: skip
    assert {name: getattr(context, name) for name in expected} == expected
    assert ctypes.sizeof(ContextParams) == 168


def with_value(data: bytes, key: str, value: int) -> bytes:
    """Replace the four-byte whole number of a key."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


@pytest.mark.parametrize(
    ("family", "damage", "reason"),
    [
        ("llama", lambda data: with_value(data, "llama.block_count", 0), "aborts on .*n_layer_all > 0"),
        ("qwen3", lambda data: with_value(data, "qwen3.rope.dimension_count", 2), "aborts on .*n_embd_head == n_rot"),
        ("gpt2", lambda data: with_value(data, "gpt2.attention.head_count", 5), "aborts on "),
        (
            "llama",
            lambda data: data.replace(b"\x01" + bytes(7) + b"a", b"\x01" + bytes(7) + b"b", 1),
            r"aborts on .*token_to_id",
        ),
        ("llama", lambda data: with_value(data, "llama.context_length", 2**31), "has a context of -2147483648 tokens"),
        ("llama", lambda data: data[:1000], "cannot load"),
    ],
)
def test_a_file_that_makes_llama_cpp_abort_is_a_user_error(family, damage, reason, tmp_path, tiny_tokenizer, capfd):
    path = tmp_path / "x.gguf"
    export_gguf(tiny_model(vocab_size=300, **FAMILIES[family]), tiny_tokenizer, path, "f32")
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(UserError, match=reason) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_any_damage_is_a_user_error(gguf, tmp_path):
    path, whole, rng = tmp_path / "x.gguf", gguf.read_bytes(), random.Random(0)
    for _ in range(round(12 * FUZZ)):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 30])):
            size, value = rng.choice([1, 2, 4, 8]), rng.choice([0, 1, 255, 2**31, 2**63, 2**64 - 1])
            at = rng.randrange(rng.choice([2500, 9000, len(whole) - 8]))
            damaged[at : at + size] = (value % 256**size).to_bytes(size, "little")
        path.write_bytes(damaged[: rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])
        try:
            open_gguf(path).close()
        except UserError as error:
            assert len(str(error).splitlines()) == 1


def test_what_is_not_a_plain_file_is_refused(tmp_path, gguf):
    os.mkfifo(tmp_path / "x.gguf")
    for path in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(UserError, match="is not a file"):
            open_gguf(path)
    with open_gguf(gguf, n_ctx=1) as llama:
        assert llama.n_ctx == 1
