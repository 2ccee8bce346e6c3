"""Adapters change nothing at first, merge without loss, and give the same logits in PEFT and llama.cpp."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import json
import re
import shutil
from ctypes import POINTER, c_char_p, c_float, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from project import ROOT
from test_gguf import GPT2, IDS, LLAMA, QWEN3, STABLELM, byte_tokenizer, logprobs, random_model
from test_train import PARAMS, runs_in_tmp, same, tokens, train  # noqa: F401
from transformers import AutoModelForCausalLM

from tinygpt import paths
from tinygpt.errors import UserError
from tinygpt.export.card import read_training
from tinygpt.export.config import ExportParams
from tinygpt.export.folders import export_adapters, open_model, write_base
from tinygpt.export.gguf import export_gguf, export_gguf_adapter
from tinygpt.export.hf import export_hf, export_peft
from tinygpt.export.llamacpp import LlamaCpp, open_gguf
from tinygpt.files import sha256_file, write_json
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import LoRAEmbedding, LoRALinear, add_lora, merged_tensors, trained_tensors
from tinygpt.model.weights import WEIGHTS_FILE, load_tensors, model_tensors, save_tensors
from tinygpt.params import ParamsError, from_mapping
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.trainer import Trainer

LORA = {"rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ("q_proj", "v_proj", "o_proj", "up_proj")}
BLOCK = r"```python\n(.*?)```"
ADAPTED = ("k_proj", "v_proj", "down_proj", "lm_head")
STARCODER = {"norm": "layernorm", "mlp": "gelu"}


def apply(llama: LlamaCpp, path: Path) -> bool:
    """Let llama.cpp use an adapter from now on; returns whether it fits the model."""
    load, use = llama._lib.llama_adapter_lora_init, llama._lib.llama_set_adapters_lora
    load.restype, load.argtypes = c_void_p, [c_void_p, c_char_p]
    use.argtypes = [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]
    adapter = load(llama._model, os.fsencode(path))
    return bool(adapter) and use(llama._context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0)) == 0


def adapted(model: GPT, **changes) -> GPT:
    """A copy of a model with random adapters."""
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    add_lora(copy, **{**LORA, **changes}, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in copy.modules():
            if isinstance(module, LoRALinear | LoRAEmbedding):
                zeros = module.lora_B if isinstance(module, LoRALinear) else module.lora_A
                assert not zeros.weight.any()
                zeros.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return copy.eval()


def merged(model: GPT) -> GPT:
    plain = GPT(model.config).eval()
    plain.load_state_dict(merged_tensors(model, trained_tensors(model)), strict=False)
    return plain


def test_an_adapter_does_nothing_at_first_and_is_all_that_is_trained():
    model = tiny_model(tie_weights=False)
    ids, before = random_ids(2, 20), None
    before = model(ids)
    add_lora(model, **LORA, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids), before)
    names = trained_tensors(model)
    assert len(names) == 2 * 4 * 2
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)
    assert names["blocks.1.attn.q_proj.lora_A.weight"].shape == (3, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_compute_the_same_and_have_plain_names(tied):
    model = tiny_model(tie_weights=tied)
    with_adapters = adapted(model, targets=None)
    plain, ids = merged(with_adapters), random_ids(2, 20)
    assert (with_adapters(ids) - model(ids)).abs().max() > 0.1
    torch.testing.assert_close(plain(ids), with_adapters(ids), atol=1e-4, rtol=1e-4)
    assert ("lm_head.weight" in merged_tensors(with_adapters, trained_tensors(with_adapters))) is not tied


def test_dropout_is_on_the_adapters_input_in_training_alone():
    model = adapted(tiny_model(), dropout=0.5)
    ids = random_ids(1, 10)
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))
    model.set_dropout(0.0)  # the model's own dropout, not the adapters'
    assert not torch.equal(model(ids), model(ids))
    ends = adapted(tiny_model(tie_weights=False), dropout=0.5, targets=("tok_emb", "lm_head")).train()
    assert torch.equal(ends(ids), ends(ids))


@pytest.mark.parametrize("targets, n_adapter", [(LORA["targets"], 2 * 4), (None, 2 * 7 + 2)])
def test_training_changes_adapters_alone_and_resumes_to_the_same_bits(targets, n_adapter, monkeypatch):
    base = {name: tensor.detach() for name, tensor in tiny_model(tie_weights=False).state_dict().items()}
    params = dataclasses.replace(PARAMS, init_from="base", lora=LoRAParams(**LORA | {"targets": targets}), eval_every=5)
    from_base = {"params": params, "base": base, "tie_weights": False}
    undisturbed = train("undisturbed", **from_base)
    for name, tensor in undisturbed.last.items():
        target = tensor.ndim == 2 and (targets is None or name.split(".")[-2] in targets)
        assert torch.equal(tensor, base[name]) is not target, name
    assert len(undisturbed.trained) == 2 * n_adapter

    class Killed(BaseException):
        pass

    original = Trainer._train_step

    def die_at_seven(trainer, step, **how):
        if step == 7:
            raise Killed
        original(trainer, step, **how)

    monkeypatch.setattr(Trainer, "_train_step", die_at_seven)
    with pytest.raises(Killed):
        train("cut", **from_base)
    monkeypatch.setattr(Trainer, "_train_step", original)
    resumed = train("cut", **from_base)
    assert same(resumed.last, undisturbed.last)
    assert same(resumed.trained, undisturbed.trained)


def test_targets_that_do_not_exist_and_adapters_without_a_base_are_refused():
    values = dataclasses.asdict(PARAMS) | {"betas": [0.9, 0.99], "lora": {**LORA, "targets": ["q_proj"]}}
    with pytest.raises(ParamsError, match=r"set train.init_from=base, or train.lora=null"):
        from_mapping(TrainParams, values, prefix="train.")
    values["lora"] = {"rank": 0, "alpha": 1, "dropout": 0, "targets": ["k_prj"], "alhpa": 1}
    with pytest.raises(ParamsError) as caught:
        from_mapping(TrainParams, values, prefix="train.")
    for problem in ("train.lora.rank=0 must be", "did you mean k_proj", "unknown key train.lora.alhpa"):
        assert problem in str(caught.value)


FAMILIES = [LLAMA, QWEN3, GPT2 | {"bias": "all"}, STABLELM, LLAMA | STARCODER, LLAMA | {"mlp": "relu2", "head_dim": 12}]


@pytest.mark.parametrize("tied, targets", [(True, LORA["targets"]), (True, None), (False, ADAPTED), (False, None)])
@pytest.mark.parametrize("family", FAMILIES, ids=["llama", "qwen3", "gpt2", "stablelm", "starcoder2", "arcee"])
def test_peft_and_llama_cpp_apply_the_adapter_to_its_base(family, tied, targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = random_model(**family, n_kv_head=2, vocab_size=257, tie_weights=tied)
    model, tokenizer = adapted(base, targets=targets), byte_tokenizer()
    assert isinstance(model.tok_emb, LoRAEmbedding) is (targets is None and not tied)
    adapter, ids = trained_tensors(model), torch.from_numpy(IDS)[None]
    with torch.inference_mode():
        ours = model(ids)[0].log_softmax(-1)
        assert (ours - base(ids)[0].log_softmax(-1)).abs().max() > 0.05

    tokenizer.save(tmp_path)
    export_hf(base, tokenizer, tmp_path, tmp_path / "hf")
    export_peft(tmp_path / "peft", adapter, model.config, LORA)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "peft")
    saved = load_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(saved) == sum("lora_" in name for name, _ in theirs.named_parameters())
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(ids).logits[0].log_softmax(-1), ours, atol=1e-4, rtol=1e-4)

    export_gguf(base, tokenizer, tmp_path / "base.gguf", "f32")
    export_gguf_adapter(tmp_path / "lora.gguf", adapter, model.config, LORA)
    with LlamaCpp(tmp_path / "base.gguf") as llama:
        assert apply(llama, tmp_path / "lora.gguf")
        found = logprobs(llama.logits(IDS.tolist()))
    np.testing.assert_allclose(found, ours.numpy(), atol=1e-2 if family["mlp"] == "gelu" else 1e-4)


def test_the_readme_of_the_adapters_shows_how_to_load_them(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    base = random_model(**LLAMA, vocab_size=257)
    model = adapted(base)
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "data/base", base.config, model_tensors(base), byte_tokenizer())
    export_peft(tmp_path / "data/export/peft", trained_tensors(model), model.config, LORA)
    readme = tmp_path / "data/export/peft/README.md"
    documented, write, *loads = (
        code for path in (ROOT / "docs/export.md", readme) for code in re.findall(BLOCK, path.read_text(), re.DOTALL)
    )
    exec(documented, {})
    with LlamaCpp(tmp_path / "data/base.gguf"):
        shutil.rmtree(tmp_path / "data/base-hf")
    exec(write, {})
    for load in loads:
        scope = {}
        exec(load, scope)
        with torch.inference_mode():
            ids = torch.from_numpy(IDS)[None]
            torch.testing.assert_close(scope["model"].eval()(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


@pytest.fixture
def trained_folder(tmp_path, monkeypatch) -> Path:
    """A project's folder with a base, and a model trained from it with adapters of all matrices."""
    base = random_model(**LLAMA, vocab_size=257, tie_weights=False)
    monkeypatch.chdir(tmp_path)
    write_base(paths.BASE, base.config, model_tensors(base), byte_tokenizer())
    lora = LoRAParams(**LORA | {"targets": None})
    params = dataclasses.asdict(dataclasses.replace(PARAMS, init_from="base", lora=lora))
    write_json(paths.MODEL / "training.json", params | {"base_sha256": sha256_file(paths.BASE / WEIGHTS_FILE)})
    save_tensors(paths.MODEL / "adapter.safetensors", trained_tensors(adapted(base, targets=None)))
    return tmp_path


def exported() -> list[str]:
    model = random_model(**LLAMA, vocab_size=257, tie_weights=False)
    params = ExportParams(hf=True, gguf=("f32",), check_tokens=512)
    return export_adapters(Path("out"), paths.MODEL, paths.BASE, model, params)


@pytest.mark.parametrize("key", ["init_from", "lora", "base_sha256", *LORA])
@pytest.mark.parametrize("value", ["gone", [{"a": 1}], {}, -1, True, "x"])
def test_a_damaged_training_json_is_reported_with_its_key(trained_folder, key, value):
    training = json.loads((paths.MODEL / "training.json").read_text())
    holder = training["lora"] if key in LORA else training
    holder[key] = value
    if value == "gone":
        del holder[key]
    (paths.MODEL / "training.json").write_text(json.dumps(training))
    if key in ("init_from", "base_sha256") and value == "x":  # any text is allowed there
        assert read_training(paths.MODEL)
        return
    with pytest.raises(UserError, match=rf"data/model/training.json was written by another version \(.*{key}"):
        exported()


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "renamed"])
def test_adapters_of_another_shape_are_reported_with_their_names(trained_folder, damage):
    tensors = load_tensors(paths.MODEL / "adapter.safetensors")
    assert len(exported()) == 2
    with pytest.raises(UserError, match="out/peft has adapters alone: data/model is the model with them"):
        open_model("out/peft")
    name = sorted(tensors)[3]
    changed = {
        "missing": {key: tensor for key, tensor in tensors.items() if key != name},
        "extra": tensors | {"extra": torch.zeros(2)},
        "misshapen": tensors | {name: torch.zeros(2, 2)},
        "renamed": {key.replace("lora_A", "lora_C"): tensor for key, tensor in tensors.items()},
    }
    save_tensors(paths.MODEL / "adapter.safetensors", changed[damage])
    with pytest.raises(UserError, match=r"adapter.safetensors does not fit training.json: "):
        exported()


def test_an_adapter_without_its_base_or_of_another_is_refused(tmp_path):
    base = random_model(**LLAMA, vocab_size=257)
    other = adapted(random_model(**LLAMA, vocab_size=257, n_embd=96))
    export_gguf(base, byte_tokenizer(), tmp_path / "base.gguf", "f32")
    export_gguf_adapter(tmp_path / "lora.gguf", trained_tensors(other), other.config, LORA)
    with LlamaCpp(tmp_path / "base.gguf") as llama:
        assert not apply(llama, tmp_path / "lora.gguf")
    with pytest.raises(UserError, match=r"lora.gguf has adapters alone: give the model with them"):
        open_gguf(tmp_path / "lora.gguf")
