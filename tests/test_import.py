"""Models of transformers become ours, with the same logits; those that would not have the same are refused."""

import json
import os
import re
import signal
import weakref
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from conftest import tiny_model
from project import refused, run_stages, set_params
from safetensors.torch import load_file, save_file
from test_files import in_child
from test_gguf import LLAMA, byte_tokenizer, random_model

from tinygpt.errors import UserError
from tinygpt.export import folders, layout
from tinygpt.export.folders import read_hf_pair, write_base
from tinygpt.export.hf import export_hf, read_hf
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import filled_model, load_model, load_pair, model_tensors
from tinygpt.tokenizer import load_tokenizer

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
ROPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WHOLE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}
MODELS = {
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2 untied": transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40, tie_word_embeddings=False
    ),
    "llama": transformers.LlamaConfig(**ROPE, rms_norm_eps=1e-6),
    "llama biased": transformers.LlamaConfig(**ROPE, attention_bias=True, mlp_bias=True, head_dim=12),
    "llama tied": transformers.LlamaConfig(**ROPE, tie_word_embeddings=True, rope_parameters=WHOLE),
    "mistral": transformers.MistralConfig(**ROPE, sliding_window=16),
    "qwen3": transformers.Qwen3Config(**ROPE, head_dim=16),
    "qwen3 windows": transformers.Qwen3Config(
        **ROPE,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "starcoder2": transformers.Starcoder2Config(**ROPE),
    "phi": transformers.PhiConfig(**ROPE, rope_parameters=WHOLE),
    "stablelm": transformers.StableLmConfig(**ROPE, rope_parameters=WHOLE, use_qkv_bias=True),
    "stablelm parallel": transformers.StableLmConfig(**ROPE, rope_parameters=WHOLE, use_parallel_residual=True),
    "arcee": transformers.ArceeConfig(**ROPE),
    "cohere2": transformers.Cohere2Config(
        **ROPE, logit_scale=1.0, sliding_window=16, layer_types=["sliding_attention"] * 4, rope_parameters=WHOLE
    ),
}


def saved(config: transformers.PretrainedConfig, folder: Path) -> torch.nn.Module:
    """A random model of transformers, saved to a folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # no model of ours has Phi's bias of the head, or StableLM's biases of norms alone
            if name != "lm_head.bias" and not (config.model_type == "stablelm" and name.endswith("norm.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, changes: dict[str, object]) -> None:
    """Change keys of a config.json; None removes one."""
    document = json.loads((folder / "config.json").read_text()) | changes
    document = {key: value for key, value in document.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = saved(MODELS[name], tmp_path)
    config, tensors = read_hf(tmp_path)
    model = GPT(config).eval()
    model.load_state_dict(tensors, strict=False)
    with torch.inference_mode():
        logits = theirs(IDS).logits
        assert logits.std() > 0.2
        torch.testing.assert_close(model(IDS), logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all"},
        {"norm": "layernorm", "mlp": "gelu", "bias": "qkv"},
        {
            "norm": "layernorm",
            "mlp": "gelu",
            "bias": "all",
            "parallel_block": True,
            "qk_norm": True,
            "tie_weights": False,
        },
        {"norm": "layernorm", "qk_norm": True, "n_kv_head": 2},
        {"bias": "qkv", "head_dim": 6},
        {"window": 8},
        {"qk_norm": True, "n_kv_head": 1, "window": 8, "full_every": 2, "norm_eps": 1e-6},
        {"mlp": "relu2", "bias": "all", "rope_theta": 500.0},
        {"norm": "layernorm", "parallel_block": True, "tie_weights": True, "window": 8, "bias": "qkv"},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_what_is_exported_comes_back(changes, tmp_path, tiny_tokenizer):
    model = tiny_model(**changes)
    tiny_tokenizer.save(tmp_path)
    export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
    config, tensors = read_hf(tmp_path / "hf")
    assert config == model.config
    expected = model_tensors(model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_heads_that_share_a_norm_here_must_have_equal_ones(tmp_path, tiny_tokenizer):
    model = tiny_model(norm="layernorm", qk_norm=True)
    tiny_tokenizer.save(tmp_path)
    export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.layers.0.self_attn.k_layernorm.norms.1.weight"][2] *= 1 + 1e-6
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"layers.0.self_attn.k_layernorm.norms.1.weight has values that"):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"has model_type gemma \(supported: gpt2, starcoder2"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type=llama3, not default"),
        ({"rope_parameters": WHOLE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, not 1.0"),
        ({"hidden_act": "relu"}, r"activation relu \(supported: silu\)"),
        ({"num_key_value_heads": 3}, "must be a multiple of model.n_kv_head=3"),
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"hidden_size": "32"}, 'model.n_embd="32" must be a whole number'),
        ({"hidden_act": ["silu"]}, "a value has the wrong type"),
        ({"rope_parameters": 3}, "a value has the wrong type"),
        ({"rms_norm_eps": None}, "it has no rms_norm_eps"),
        (
            {"max_position_embeddings": 0},
            r"config.json is not a model that tinygpt supports: model.block_size=0 must be",
        ),
        ({"num_hidden_layers": 5}, r"layers.4.input_layernorm.weight is missing"),
        ({"intermediate_size": 40}, r"gate_proj.weight is \(48, 32\), expected \(40, 32\)"),
        ({"intermediate_size": 10**12}, r"model.n_hidden=1000000000000 must be"),
        ({"intermediate_size": 10**6}, "its config.json describes 384,031,488 weights, but 50,208 were found"),
        ({"num_hidden_layers": 900}, "its config.json describes [0-9,]+ weights"),
        ({"vocab_size": 10**300}, "model.vocab_size=1000.* must be between"),
        ({"vocab_size": 2**62}, "its config.json describes 295,147,905,179,352,856,576 weights"),
    ],
)
def test_what_cannot_be_taken_is_refused(changes, message, tmp_path):
    saved(MODELS["llama"], tmp_path)
    change_config(tmp_path, changes)
    with pytest.raises(UserError, match=message) as caught:
        read_hf(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"sliding_window": 8}),
        ("gpt2", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),  # its default is longer than the context
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("mistral", {"use_sliding_window": False}),
        ("cohere2", {"use_sliding_window": False}),
        ("starcoder2", {"sliding_window": 8, "use_sliding_window": False}),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3.0}),
        ("starcoder2", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": None, "layer_types": None}),
    ],
)
def test_what_a_class_ignores_is_ignored(name, changes, tmp_path):
    saved(MODELS[name], tmp_path)
    change_config(tmp_path, changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(filled_model(*read_hf(tmp_path))(IDS), theirs(IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi", {"rope_parameters": None}, "partial_rotary_factor=0.5, not 1.0"),
        ("stablelm", {"rope_parameters": {"rope_type": "default"}}, "partial_rotary_factor=0.25, not 1.0"),
        ("qwen3 windows", {"layer_types": None}, "it has no layer_types"),
        ("qwen3 windows", {"sliding_window": -3}, r"model.window=-3 must be 1 or more"),
        (
            "qwen3 windows",
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types must give full_attention or sliding_attention for each layer",
        ),
        (
            "qwen3 windows",
            {"layer_types": ["full_attention"]},
            "layer_types must give full_attention or sliding_attention for each layer",
        ),
    ],
)
def test_a_default_of_a_class_is_not_taken_for_ours(name, changes, message, tmp_path):
    saved(MODELS[name], tmp_path)
    change_config(tmp_path, changes)
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [("llama", {"intermediate_size": 40}, "; and 6 more"), ("gpt2", {"vocab_size": 299}, "expected (299, 32)")],
)
def test_wrong_sizes_are_reported_without_the_biases_that_are_right(name, changes, told, tmp_path):
    saved(MODELS[name], tmp_path)
    document = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_hf(tmp_path)
    assert ".bias" not in str(caught.value)
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": None}, "logit_scale=0.0625, not 1.0"),  # the class's default when config.json has none
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "a cohere2 with window: in some layers would compute something else here",
        ),
    ],
)
def test_a_cohere2_with_layers_that_do_not_rotate_is_refused(changes, message, tmp_path):
    saved(MODELS["cohere2"], tmp_path)
    change_config(tmp_path, changes)
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path)


def test_only_what_the_layout_changes_is_compared(tmp_path, monkeypatch):
    compared, allclose = [], torch.allclose
    monkeypatch.setattr(
        torch, "allclose", lambda a, b, *args, **more: compared.append(a) or allclose(a, b, *args, **more)
    )
    saved(MODELS["llama"], tmp_path)
    read_hf(tmp_path)
    assert not compared


def test_a_bias_that_does_not_fit_is_forgotten_before_the_next_is_tried(tmp_path, monkeypatch):
    reverted, tried, made = layout._reverted, [], []

    def watched(name, *args):
        tensor = reverted(name, *args)
        if name == "tok_emb.weight":
            assert not [each for each in made if each() is not None]
            tried.append(name)
        if "q_proj" in name:
            made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(layout, "_reverted", watched)
    saved(MODELS["gpt2"], tmp_path)
    config, _ = read_hf(tmp_path)
    assert config.bias == "all" and len(tried) == 3


def test_a_tensor_that_is_in_no_module_is_reported(tmp_path):
    saved(MODELS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"foo": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="foo is unexpected"):
        read_hf(tmp_path)


def test_a_head_is_taken_for_the_embedding_only_if_it_equals_it(tmp_path):
    saved(MODELS["gpt2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.wte.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert read_hf(tmp_path)[0].tie_weights
    head[5, 7] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is unexpected"):
        read_hf(tmp_path)


def test_missing_weights_and_files_that_are_not_safetensors_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"config.json not found: give a folder saved by transformers"):
        read_hf(tmp_path)
    saved(MODELS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.0.self_attn.q_proj.bias is unexpected"):
        read_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights must be in a safetensors file"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(32, 32, dtype=torch.int32), "1 tensors are quantized, not floating-point or not finite, such as"),
        (torch.zeros(32, 32).to(torch.float8_e4m3fn), "1 tensors are quantized"),
        (torch.full((32, 32), torch.nan), r" or not finite, such as model.layers.0.self_attn.q_proj.weight$"),
    ],
    ids=["int32", "float8", "nan"],
)
def test_weights_that_are_not_finite_floats_are_refused(tensor, message, tmp_path):
    saved(MODELS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.0.self_attn.q_proj.weight": tensor}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}])
def test_an_index_that_names_no_files_is_refused(index, tmp_path):
    saved(MODELS["llama"], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model.safetensors.index.json has no weight_map"):
        read_hf(tmp_path)


def test_shards_and_old_names_are_read(tmp_path):
    theirs = saved(MODELS["gpt2"], tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config, found = read_hf(tmp_path)
    model = GPT(config).eval()
    model.load_state_dict(found, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=2e-5, rtol=1e-4)


def test_a_padded_vocabulary_is_refused(tmp_path, tiny_tokenizer):
    model = random_model(**LLAMA, vocab_size=tiny_tokenizer.vocab_size)
    tiny_tokenizer.save(tmp_path)
    export_hf(model, tiny_tokenizer, tmp_path, tmp_path / "hf")
    byte_tokenizer().save(tmp_path / "hf")
    with pytest.raises(UserError, match=r"the model has 300 tokens, but its tokenizer.json 257: .* a padded"):
        read_hf_pair(tmp_path / "hf")


def test_a_base_whose_writer_is_killed_between_two_files_is_the_old_one(tmp_path, tiny_tokenizer, monkeypatch):
    folder, (old, new) = tmp_path / "base", (tiny_model(seed=seed) for seed in range(2))
    write_base(folder, old.config, model_tensors(old), tiny_tokenizer)
    for file in ("save_model", "_preset"):
        with monkeypatch.context() as patch:
            patch.setattr(folders, file, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            status = in_child(lambda: write_base(folder, new.config, model_tensors(new), tiny_tokenizer))
        assert status == -signal.SIGKILL
        assert torch.equal(load_pair(folder, folder)[0].norm.weight, old.norm.weight)
    write_base(folder, new.config, model_tensors(new), tiny_tokenizer)
    assert torch.equal(load_pair(folder, folder)[0].norm.weight, new.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_with_something_else_in_it_does_not_become_a_base(tmp_path, tiny_tokenizer):
    (tmp_path / "mine.txt").touch()
    model = tiny_model()
    with pytest.raises(UserError, match=r"holds mine.txt, which is not part of a base model: give another folder"):
        write_base(tmp_path, model.config, model_tensors(model), tiny_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_training_starts_from_an_imported_and_a_promoted_model(project, command, monkeypatch):
    monkeypatch.chdir(project)
    first = json.loads((project / "reports/train.json").read_text())

    assert command("import-hf", "data/export/hf").returncode == 0
    assert "train.init_from: scratch -> base" in command("preset", "base").stdout
    set_params(project, {"train.max_steps": 10, "train.warmup_steps": 5, "train.lr": 1e-4})
    run_stages("train_tokenizer encode train", project)
    second = json.loads((project / "reports/train.json").read_text())
    assert second["val_loss"] < first["val_loss"] + 0.02
    assert json.loads((project / "data/tokens/meta.json").read_text())["tokenizer_sha256"]

    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "down_proj"]}
    set_params(project, {"train.lora": lora, "train.lr": 1e-2, "export.gguf": ["f32"]})
    said = run_stages("train evaluate export", project)
    for name in ("peft/adapter_model.safetensors", "gguf/tinygpt-lora.gguf"):
        assert re.search(f"export: {name} [0-9.]+ kB, adapters of rank 2 for .*data/base", said)
    assert re.search("train: [0-9,]+ weights .* and 384 of adapters, ", said)
    third = json.loads((project / "reports/train.json").read_text())
    assert third["val_loss"] < first["val_loss"] + 0.02
    assert third["n_params"] == first["n_params"]
    assert third["n_trained"] == 2 * (32 + 32) + 2 * (96 + 32)
    exported = {str(path.relative_to(project / "data/export")) for path in (project / "data/export").rglob("*.*")}
    assert {"peft/adapter_config.json", "peft/adapter_model.safetensors", "gguf/tinygpt-lora.gguf"} <= exported

    assert command("promote").returncode == 0
    assert torch.equal(
        load_model(project / "data/base").lm_head.weight, load_model(project / "data/model").lm_head.weight
    )
    weights = load_file(project / "data/base/model.safetensors")
    save_file(weights | {"norm.weight": 2 * weights["norm.weight"]}, project / "data/base/model.safetensors")
    assert "data/base is not the model that these adapters were trained on" in refused("export", project)
    set_params(project, {"model.n_layer": 2})
    message = (
        "data/base does not fit params.yaml (model.n_layer=2, but 1 in the base): run `python -m tinygpt preset base`, "
        "or `preset lora` for adapters, or set train.init_from=scratch and train.lora=null"
    )
    assert message in refused("train", project)
    assert load_tokenizer(project / "data/base").vocab_size == 320


def test_without_a_base_the_command_that_helps_is_named(project):
    set_params(project, {"train.init_from": "base"})
    message = "train.init_from=base, but data/base holds no model: run `python -m tinygpt import-hf FOLDER`"
    assert message in refused("train", project)
