"""The model: its ways to compute agree; causality, sizes, files."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, RUNTIME, random_ids, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinygpt.errors import UserError
from tinygpt.generate.decoder import Decoder
from tinygpt.model.attention import ATTENTION, attention_mask, explicit_attention, sdpa_attention
from tinygpt.model.config import MLPS, config_fields, derived_hidden
from tinygpt.model.gpt import GPT
from tinygpt.model.layers import NORMS, apply_rope, gelu, rope_tables
from tinygpt.model.weights import load_model, model_tensors, save_model
from tinygpt.params import ParamsError
from tinygpt.runtime import all_threads, open_device

CHOICES = {
    "position": ["learned", "rope"],
    "norm": list(NORMS),
    "mlp": list(MLPS),
    "parallel_block": [False, True],
    "windows": [(None, None), (6, None), (6, 2)],  # window and full_every
    "head_dim": [None, 10],
    "bias": ["none", "qkv", "all"],
    "n_kv_head": [4, 2, 1],
    "qk_norm": [False, True],
    "tie_weights": [True, False],
    "dropout": [0.0, 0.2],
    "attention": list(ATTENTION),
}


def pairwise_rows() -> list[dict]:
    """A few rows of choices in which every pair of choices of two switches occurs."""
    names = list(CHOICES)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in CHOICES[a] for y in CHOICES[b]}
    rng, rows = np.random.default_rng(0), []
    while missing:
        tries = [{name: values[rng.integers(len(values))] for name, values in CHOICES.items()} for _ in range(60)]
        row = max(tries, key=lambda row: len(missing & set(itertools.combinations(row.items(), 2))))
        missing -= set(itertools.combinations(row.items(), 2))
        rows.append(row)
    return rows


@pytest.mark.parametrize("row", pairwise_rows(), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_pair_of_switches_learns_and_decodes_to_the_same_logits(row):
    row = dict(row)
    row["window"], row["full_every"] = row.pop("windows")
    model = GPT(tiny_config(**row), generator=torch.Generator().manual_seed(0))
    ids = random_ids(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        expected = model(ids)
    decoder = Decoder(model, ids[:, :29].tolist())
    for place in range(28, 33):
        torch.testing.assert_close(decoder.logits, expected[:, place], atol=1e-5, rtol=1e-4)
        if place < 32:
            decoder.step(ids[:, place + 1].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_later_tokens(family):
    model, ids = tiny_model(**FAMILIES[family]), random_ids(1, 20)
    embedded = model.tok_emb(ids).detach().requires_grad_()
    handle = model.tok_emb.register_forward_hook(lambda *_: embedded)
    model(ids)[0, 9].sum().backward()
    handle.remove()
    reach = embedded.grad[0].abs().sum(-1)
    assert (reach[10:] == 0).all()
    assert (reach[:10] > 0).all()


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_explicit_and_fused_attention_agree(n_kv_head):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, n_kv_head, 9, 8), torch.randn(2, n_kv_head, 9, 8)
    torch.testing.assert_close(explicit_attention(q, k, v, None), sdpa_attention(q, k, v, None))
    for window in (None, 2, 7):
        mask = attention_mask(9, window, torch.device("cpu"))
        torch.testing.assert_close(explicit_attention(q, k, v, mask), sdpa_attention(q, k, v, mask))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_training_uses_the_fused_kernel_with_dropout_groups_and_windows_too(n_kv_head, window):
    model = GPT(tiny_config(n_kv_head=n_kv_head, dropout=0.1, window=window)).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises when flash attention cannot serve the call
        model(random_ids(2, 16)).sum().backward()


def test_the_mask_lets_each_query_see_itself_and_its_window():
    cpu = torch.device("cpu")
    assert attention_mask(3, 2, cpu).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert attention_mask(3, 1, cpu).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert attention_mask(4, None, cpu) is attention_mask(4, 4, cpu) is None


def test_a_window_reaches_as_far_as_it_says_and_full_layers_farther():
    def reach(**changes):
        model, ids = tiny_model(n_layer=2, **changes), random_ids(1, 20)
        embedded = model.tok_emb(ids).detach().requires_grad_()
        model.tok_emb.register_forward_hook(lambda *_: embedded)
        model(ids)[0, 15].sum().backward()
        return embedded.grad[0].abs().sum(-1).nonzero().flatten().tolist()

    assert reach(window=4) == list(range(15 - 2 * 3, 16))  # three back in each of two layers
    assert reach(window=4, full_every=2) == list(range(16))
    assert reach(window=20) == list(range(16))


def test_relu2_and_the_parallel_block_by_hand():
    model = tiny_model(mlp="relu2", parallel_block=True, n_layer=1, bias="all")
    block, x = model.blocks[0], torch.randn(1, 5, 32)
    tables = model.rope(5)
    n = block.attn_norm(x)
    hidden = (n @ block.mlp.up_proj.weight.T + block.mlp.up_proj.bias).clamp(min=0) ** 2
    mlp = hidden @ block.mlp.down_proj.weight.T + block.mlp.down_proj.bias
    expected = x + block.attn(n, tables, {None: None}) + mlp
    torch.testing.assert_close(block(x, tables, {None: None}), expected)
    assert not [name for name, _ in model.named_parameters() if "mlp_norm" in name]


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    tables = rope_tables(32, 8, 100.0)
    rotated_q = apply_rope(q.expand(1, 1, 32, 8), tables)[0, 0]
    rotated_k = apply_rope(k.expand(1, 1, 32, 8), tables)[0, 0]
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(32))
    products = rotated_q @ rotated_k.T
    for distance in (0, 3, 10):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-4)
    cos, sin = tables
    assert (cos[1, 0].item(), sin[1, 0].item()) == pytest.approx((math.cos(1), math.sin(1)))
    assert cos[1, 1].item() == pytest.approx(math.cos(100 ** (-2 / 8)))  # the second of four wavelengths


def test_tied_and_untied_models_of_equal_weights_agree():
    tied = tiny_model()
    untied = GPT(tiny_config(tie_weights=False))
    untied.load_state_dict(tied.state_dict())
    ids = random_ids(2, 10)
    assert torch.equal(tied(ids), untied.eval()(ids))
    assert untied.n_params() - tied.n_params() == tied.tok_emb.weight.numel()


def test_gpt2_small_has_its_known_number_of_weights():
    with torch.device("meta"):
        model = GPT(
            tiny_config(vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024, **FAMILIES["gpt2"])
        )
    assert model.n_params() == 124_439_808  # https://huggingface.co/openai-community/gpt2


def test_the_first_weights_come_from_the_seed_alone():
    one, same, other = (GPT(tiny_config(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.tok_emb.weight, other.tok_emb.weight)
    assert not one.blocks[0].attn.o_proj.weight.any()
    assert not one.blocks[0].mlp.down_proj.weight.any()
    assert one.blocks[0].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_reading_a_model_draws_no_first_weights(tmp_path):
    model = tiny_model()
    save_model(tmp_path, model.config, model_tensors(model))
    before = torch.get_rng_state()
    read = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


def test_sizes_that_are_null_are_derived():
    assert derived_hidden(256, "gelu") == 1024
    assert derived_hidden(256, "swiglu") == 704  # 682.67, rounded up to a multiple of 32
    assert tiny_config(n_head=4, n_kv_head=None).n_kv_head == 4
    assert derived_hidden(256, "relu2") == 1024
    assert tiny_config(n_embd=32, n_head=4).head_dim == 8
    assert tiny_config(n_embd=32, n_head=3, head_dim=8).head_dim == 8
    config = tiny_config(n_layer=6, window=8, full_every=3)
    assert [config.window_of(layer) for layer in range(6)] == [8, 8, None, 8, 8, None]


def test_a_sequence_that_is_too_long_raises_an_assertion():
    with pytest.raises(AssertionError, match="65 tokens, but block_size is 64"):
        tiny_model()(random_ids(1, 65))


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, FAMILIES["gpt2"], FAMILIES["qwen3"]])
def test_a_saved_model_loads_as_it_was_and_with_the_same_bytes(tmp_path, changes):
    model = tiny_model(**changes)
    for name in "ab":
        save_model(tmp_path / name, model.config, model_tensors(model))
    loaded = load_model(tmp_path / "a")
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(random_ids(1, 12)), model(random_ids(1, 12)))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_model_folder_that_does_not_fit_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"config.json not found: run `dvc repro train`"):
        load_model(tmp_path)
    model = tiny_model()
    save_model(tmp_path, model.config, model_tensors(model))

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["surplus"] = tensors.pop("norm.weight")
    tensors["tok_emb.weight"] = tensors["tok_emb.weight"][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    for problem in (
        "norm.weight is missing",
        "surplus is unexpected",
        r"tok_emb.weight is (5, 32), expected (300, 32)",
    ):
        assert problem in str(caught.value)

    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as safetensors"):
        load_model(tmp_path)

    fields = config_fields(model.config)
    older, newer = {k: v for k, v in fields.items() if k != "qk_norm"}, fields | {"sinks": True}
    for other, problem in ((older, "missing key qk_norm"), (newer, "unknown key sinks")):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=rf"config.json was written by another version .*{problem}"):
            load_model(tmp_path)


def test_after_another_number_of_threads_zero_is_all_of_them_again(monkeypatch):
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: [7, *set_to][-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    all_threads.cache_clear()
    try:
        for n in (1, 0):
            open_device(dataclasses.replace(RUNTIME, n_thread=n))
    finally:
        all_threads.cache_clear()
    assert set_to == [1, 7]


def test_a_device_that_is_not_there_is_refused():
    runtime = dataclasses.replace(RUNTIME, device="auto")
    assert open_device(runtime).type in ("cpu", "cuda", "mps")
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(ParamsError, match=f"runtime.device={missing} is not available"):
        open_device(dataclasses.replace(RUNTIME, device=missing))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-6), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_gelu_is_the_tanh_form_and_its_gradient_in_every_precision(dtype, atol):
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), x)
    short = x.detach().to(dtype).requires_grad_()
    found = gelu(short)
    found.sum().backward()
    assert (found.double() - expected).abs().max() < atol
    assert (short.grad.double() - slope).abs().max() < atol
    far = torch.tensor([-80.0, 80.0], dtype=dtype, requires_grad=True)
    gelu(far).sum().backward()
    assert far.grad.tolist() == [0, 1]
    assert torch.autograd.gradcheck(gelu, x[::50].detach().requires_grad_())
