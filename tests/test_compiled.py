"""The compiled step, for one row and for several, gives the model's logits."""

import pytest
import torch
from conftest import FAMILIES, random_ids, tiny_model

from tinygpt.generate import compiled
from tinygpt.generate.compiled import compile_step
from tinygpt.generate.decoder import STEPS, Decoder
from tinygpt.model import layers
from tinygpt.model.quantize import quantize

pytestmark = pytest.mark.slow

# (most rows, config).  They are few, since each takes seconds to compile, but together they reach every branch.
KINDS = {
    "gpt2": (1, {"n_layer": 1, **FAMILIES["gpt2"]}),
    "parallel, mqa, window": (
        1,
        {
            "n_layer": 1,
            "parallel_block": True,
            "n_kv_head": 1,
            "norm": "layernorm",
            "mlp": "relu2",
            "bias": "qkv",
            "window": 7,
        },
    ),
    "growing, windows, gqa, qk_norm": (
        10,
        {"block_size": 56, "window": 40, "full_every": 2, "n_kv_head": 2, "qk_norm": True},
    ),
}
FIRST_ROOM = 32  # tokens that the cache has room for at first; with the longer context, it grows
ROOM = 4  # tokens that can be taken back; a model with windows is compiled for one such number


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request):
    n_row, config = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "FIRST_ROOM", FIRST_ROOM)
        patch.setattr(compiled, "onednn_is_faster", lambda: False)
        model = tiny_model(**{"block_size": FIRST_ROOM, **config})
        compile_step(model, n_row=n_row, room=ROOM)
        yield model


def expected_after(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[:, -1]


def n_graphs() -> int:
    """How many graphs have been compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def operations_of_a_step(model, n_row: int) -> set[str]:
    decoder = Decoder(model, [[1, 2]] * n_row, room=ROOM)
    with torch.profiler.profile() as profiled:
        decoder.step([3] * n_row)
    return {event.name for event in profiled.events()} & {"aten::mm", "aten::add", "aten::embedding"}


def test_a_compiled_step_calls_only_these_operations(model):
    most, n_graph = STEPS[model].n_row, n_graphs()
    for n_row in range(1, most + 1):
        assert operations_of_a_step(model, n_row) == ({"aten::mm"} if n_row > 1 else set())
    assert operations_of_a_step(model, most + 1) == {"aten::mm", "aten::add", "aten::embedding"}
    for n_row in range(1, most + 1):
        decoder = Decoder(model, [[1]] * n_row, room=ROOM)
        for _ in range(model.config.block_size - 2):
            decoder.step([3] * n_row)
    assert n_graphs() == n_graph  # the same code for all lengths, rooms and numbers of rows


def test_compiled_rows_have_any_length_up_to_a_full_context_and_past_it(model):
    most, full = min(3, STEPS[model].n_row), model.config.block_size
    rows = [[1], random_ids(9).tolist(), random_ids(20).tolist()][:most]
    decoder = Decoder(model, rows, room=ROOM)
    for step in range(40):
        added = [(17 * step + 5 * row) % 300 for row in range(len(rows))]
        decoder.step(added)
        rows = [[*ids, new] for ids, new in zip(rows, added, strict=True)]
        rows = [ids if len(ids) <= full else ids[-1 - full // 2 :] for ids in rows]
        for row, ids in enumerate(rows):
            torch.testing.assert_close(decoder.logits[row : row + 1], expected_after(model, ids), atol=2e-5, rtol=2e-5)
        if step == 15:
            del rows[1:-1]
            decoder.keep([0, most - 1][: len(rows)])


def test_compiled_steps_allow_tokens_taken_back_and_rows_that_come_and_go(model):
    ids = random_ids(12).tolist()
    decoder = Decoder(model, [ids], room=ROOM)
    for new, n_back in ([5, 7, 9], 2), ([8], 0), ([3, 2, 1, 4, 6], 4):
        decoder.advance(new)
        decoder.back(n_back)
        ids = [*ids, *new][: len(ids) + len(new) - n_back]
        decoder.step([11])
        ids.append(11)
        torch.testing.assert_close(decoder.logits, expected_after(model, ids), atol=2e-5, rtol=2e-5)
    decoder.join([[4, 2]])
    decoder.step([1, 2])
    decoder.keep([1])
    decoder.step([3])
    torch.testing.assert_close(decoder.logits, expected_after(model, [4, 2, 2, 3]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("model", [KINDS["gpt2"]], indirect=True)
def test_each_model_has_its_own_code_and_changed_weights_are_compiled_again(model):
    other = tiny_model(seed=9, block_size=32, **KINDS["gpt2"][1])  # its machine code is cached already
    compile_step(other)
    assert STEPS[other] is not STEPS[model]
    for one in (other, model):
        with torch.no_grad():
            one.blocks[0].mlp.down_proj.weight.mul_(0.5)
            one.norm.weight.mul_(3)
        compile_step(one)
        decoder = Decoder(one, [[1, 2]])
        decoder.step([3])
        torch.testing.assert_close(decoder.logits, expected_after(one, [1, 2, 3]), atol=2e-5, rtol=2e-5)


def test_compiled_steps_use_int8_weights():
    plain, model = (tiny_model(n_layer=1, n_embd=128) for _ in range(2))  # as in test_serve.py, to compile once
    quantize(plain, "int8")
    quantize(model, "int8")
    compile_step(model, n_row=2)
    for prompts in ([[1, 2]], [[1, 2], [4]]):
        decoders = [Decoder(one, prompts) for one in (plain, model)]
        for decoder in decoders:
            decoder.step([3] * len(prompts))
        # before the next product, a difference in float32's last bit may become one in bfloat16's
        torch.testing.assert_close(decoders[1].logits, decoders[0].logits, atol=0.05, rtol=0.02)
