"""Foreign model folders are accepted, or refused in one line, with memory and time in proportion to their size."""

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FUZZ, tiny_model
from safetensors.torch import load_file, save_file

from tinygpt.errors import UserError
from tinygpt.export.folders import open_model
from tinygpt.export.hf import export_hf
from tinygpt.generate.decoder import Decoder
from tinygpt.model.weights import model_tensors, save_model

MOST_S, MOST_BYTES = 20, 1_000_000_000
ODD = [
    None,
    True,
    [],
    {},
    "",
    "x",
    "\x1b]0;x\x07",
    0,
    -1,
    3,
    0.5,
    1e308,
    -0.0,
    10**6,
    10**12,
    2**62,
    2**63,
    2**70,
    10**300,
]
WHOLE = {"llama": {}, "qwen3": {"qk_norm": True, "window": 8, "full_every": 2}}
WHOLE["gpt2"] = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all"}


@pytest.fixture(scope="module", params=["ours", *WHOLE])
def sound(request, tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder in our format, or in that of transformers."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_tokenizer.save(folder)
    model = tiny_model(**WHOLE.get(request.param, {"window": 8}))
    if request.param == "ours":
        save_model(folder, model.config, model_tensors(model))
        return folder
    export_hf(model, tiny_tokenizer, folder, folder / "hf")
    return folder / "hf"


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test raises the peak of memory by more than MOST_BYTES."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_BYTES


def refusal(folder: Path) -> str | None:
    """Open a folder and run two tokens; returns the error that refuses it, or None."""
    began = time.process_time()
    try:
        model, _ = open_model(folder)
        Decoder(model, [[1]]).step([2])
        return None
    except UserError as error:
        assert len(str(error).splitlines()) <= max(1, len(getattr(error, "problems", ())))
        return str(error)
    finally:
        assert time.process_time() - began < MOST_S


def change(path: Path, key: str, value: Any) -> None:
    """Change the value of a key in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def reheaded(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, with the right size."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def test_any_value_of_any_config_key_is_read_or_refused(folder):
    path = folder / "config.json"
    whole, rng = path.read_text(), random.Random(0)
    assert refusal(folder) is None
    for key in json.loads(whole):
        for value in rng.sample(ODD, min(len(ODD), round(5 * FUZZ))):
            path.write_text(whole)
            change(path, key, value)
            refusal(folder)


@pytest.mark.parametrize("n", [10**6, 10**12, 2**63, 10**300])
def test_sizes_beyond_the_weights_are_reported_before_anything_is_built(folder, n):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for key in ("vocab_size", "n_layer", "num_hidden_layers", "n_embd", "hidden_size", "n_head", "num_attention_heads"):
        if key in document:
            path.write_text(json.dumps(document | {key: n, "layer_types": None, "head_dim": 8}))
            assert refusal(folder)


def test_any_value_in_the_header_of_weights_is_read_or_refused(folder):
    path = folder / "model.safetensors"
    whole, rng = path.read_bytes(), random.Random(0)
    names = [name for name in json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]) if name != "__metadata__"]
    for _ in range(round(40 * FUZZ)):
        path.write_bytes(whole)
        name, key, value = rng.choice(names), rng.choice(["dtype", "shape", "data_offsets"]), rng.choice(ODD)
        odd = rng.choice([value, [value], [value, value], "I32", "F16", "BOOL", "F8_E4M3", "F4"])
        reheaded(path, lambda header: header[name].update({key: odd}))  # noqa: B023  # called at once
        assert refusal(folder)


def test_damaged_bytes_of_any_model_file_are_read_or_refused(folder):
    rng = random.Random(0)
    paths = [path for path in folder.iterdir() if path.name != "generation_config.json"]
    for _ in range(round(40 * FUZZ)):
        path = rng.choice(paths)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 30])):
            damaged[rng.randrange(min(len(damaged), rng.choice([16, 3000])))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        refusal(folder)
        path.write_bytes(whole)


def test_tensors_of_other_shapes_types_and_names_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in random.Random(0).sample([*tensors], min(len(tensors), round(8 * FUZZ))):
        tensor = tensors[name]
        odd = [torch.ones(()), torch.ones(0), torch.ones(3, 2), torch.ones(1, 1, 1), tensor[:-1], tensor[None]]
        for other in (
            *odd,
            tensor.new_empty(0, *tensor.shape[1:]),
            tensor.int(),
            tensor.mT.contiguous() if tensor.ndim > 1 else tensor[1:],
        ):
            if other.dtype != tensor.dtype or other.shape != tensor.shape:
                save_file(tensors | {name: other}, path)
                assert refusal(folder)
    known = "blocks.0.attn_norm.weight"
    for name in (known, "x.q_proj.bias", "\x1b[2J.k_proj.weight", "q_proj", "norm.norms.7.weight"):
        if name not in tensors:
            save_file(tensors | {name: torch.ones(())}, path)
            assert "is unexpected" in refusal(folder)


def test_a_header_longer_than_the_file_or_with_overlaps_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 2**31, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + whole[8:])
        assert "cannot be read as safetensors" in refusal(folder)
    path.write_bytes(whole)
    names = [*load_file(path)][:2]
    reheaded(path, lambda header: header[names[0]].update(data_offsets=header[names[1]]["data_offsets"]))
    assert "cannot be read as safetensors" in refusal(folder)


def test_what_is_not_a_plain_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "blob")
    path.symlink_to("blob")  # as in the cache of the Hugging Face hub
    assert refusal(folder) is None
    path.unlink()
    path.mkdir()
    assert "is not a file" in refusal(folder)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert "is not a file" in refusal(folder)


def test_an_index_stays_in_its_folder_and_names_each_tensor_once(folder):
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if "model_type" not in json.loads((folder / "config.json").read_text()):
        return
    tensors = load_file(path)
    for outside in ("../model.safetensors", "/etc/passwd", "a/../b"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, outside)}))
        assert "not a file in its folder" in refusal(folder)
    shutil.copy(path, folder / "again.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "again.safetensors", "b": path.name}}))
    assert f"{len(tensors)} tensors are in two files" in refusal(folder)
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    assert "cannot be read as safetensors" in refusal(folder)
    index.unlink()
    assert "weights must be in a safetensors file" in refusal(folder)


def test_a_context_of_ten_million_tokens_costs_nothing(folder):
    document = json.loads((folder / "config.json").read_text())
    for key in ("block_size", "max_position_embeddings"):
        if key in document:
            change(folder / "config.json", key, 5 * 10**7)
            assert refusal(folder) is None
