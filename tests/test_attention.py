"""Attention maps: they are the weights that the model computes with, and can be drawn as a picture and a page."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model

from tinygpt.cli.main import main
from tinygpt.model.inside import attention_maps
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.report.page import attention_page
from tinygpt.report.plots import plot_attention

IDS = random_ids(1, 12)[0].tolist()


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "attention": "explicit"}, {"qk_norm": True, "window": 3}])
def test_weights_are_shares_of_the_past_and_the_model_is_left_as_it_was(changes):
    model = tiny_model(**changes)
    before = model(torch.tensor([IDS]))
    maps = attention_maps(model, IDS)
    assert maps.shape == (2, 4, 12, 12)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    reach = np.triu(np.tril(np.ones((12, 12))), 1 - changes.get("window", 12))
    assert ((maps > 0) == (reach > 0)).all()
    assert torch.equal(model(torch.tensor([IDS])), before)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "window": 3}])
def test_of_one_row_no_others_are_computed_and_no_logits(changes, monkeypatch):
    model = tiny_model(**changes)
    expected = attention_maps(model, IDS)[:, :, -1:]
    monkeypatch.setattr(model.lm_head, "forward", None)
    np.testing.assert_allclose(attention_maps(model, IDS, rows=slice(-1, None)), expected, rtol=1e-5)


def test_weights_times_values_are_the_output_of_a_layer():
    model, maps, seen = tiny_model(n_layer=1), [], {}
    layer = model.blocks[0].attn
    layer.v_proj.register_forward_hook(lambda _module, _inputs, output: seen.update(v=output))
    layer.o_proj.register_forward_hook(lambda _module, inputs, _output: seen.update(y=inputs[0]))
    maps = torch.from_numpy(attention_maps(model, IDS))[0]  # (H, T, T)
    v = seen["v"].unflatten(-1, (4, 8)).transpose(1, 2)[0]  # (H, T, D)
    torch.testing.assert_close((maps @ v).transpose(0, 1).flatten(1), seen["y"][0])


def test_the_page_holds_the_numbers_and_no_token_breaks_it():
    maps = np.tril(np.full((1, 2, 3, 3), 0.25, np.float32))
    page = attention_page(maps, ["</script>", "a&b", "é"])
    assert page.count("</script>") == 3
    assert "https://" not in page and "http://" not in page
    found = json.loads(re.search(r'id="data">(.*)</script>', page)[1])["attention"]
    assert (found["tokens"], found["shape"]) == (["</script>", "a&b", "é"], [1, 2, 3, 3])
    shares = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(1, 2, 3, 3) / 255
    np.testing.assert_allclose(shares, maps, atol=1 / 500)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_has_the_same_bytes_each_time(suffix, tmp_path):
    maps = attention_maps(tiny_model(n_head=2), IDS)
    for name in "ab":
        plot_attention(maps, [str(i) for i in IDS], tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_the_places_of_many_tokens_are_whole_numbers(tmp_path):
    plot_attention(np.full((1, 1, 20, 20), 0.05, np.float32), ["a"] * 20, tmp_path / "a.svg")
    places = {float(text) for text in re.findall(r">([\d.]+)</text>", (tmp_path / "a.svg").read_text())}
    assert len(places) > 5
    assert not [place for place in places if place > 1 and place != int(place)]


def test_the_command_draws_and_refuses(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    save_model(tmp_path / "model", model.config, model_tensors(model))
    tiny_tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    command = ["tinygpt", "attention", "--model", "model", "--tokenizer", "tokenizer", "--prompt"]
    monkeypatch.setattr("sys.argv", [*command, "the file", "--plot", "a.svg"])
    main()
    assert "a.svg has all 8 heads, a.html shows one after the other" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "a.svg").read_text()
    monkeypatch.setattr("sys.argv", [*command, "the file", "--plot", "b.svg", "--generate", "5"])
    main()
    found = json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / "b.html").read_text())[1])["attention"]
    n = len(found["tokens"])
    assert "".join(found["tokens"]).startswith("<|endoftext|>the·file") and found["shape"] == [2, 4, n, n]
    assert n > len(tiny_tokenizer.encode("the file")) + 1
    for options, message in [
        (["x" * 200], "--prompt has 2[0-9]+ tokens, but the model reads only 64"),
        (["the", "--generate", "99"], "--prompt with --generate=99 has 1[0-9]+ tokens, but the model reads only 64"),
        (["x", "--plot", "a.gif"], "the name must end in .svg or .png"),
    ]:
        monkeypatch.setattr("sys.argv", [*command, *options])
        with pytest.raises(SystemExit, match=message):
            main()
