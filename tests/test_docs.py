"""The code in the documents, run unchanged."""

import dataclasses
import re
from types import CodeType

import pytest
from conftest import prose, tiny_model
from project import ROOT

from docs.params import page
from tinygpt.corpus import sources
from tinygpt.generate import Sampling, Search, Speculation
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.options import Limits
from tinygpt.serve.request import Body
from tinygpt.tokenizer.bpe import train_bpe


@pytest.fixture
def folder(tmp_path):
    """data/model and data/tokenizer as the pipeline leaves them, the model with random weights."""
    tokenizer = train_bpe([prose(2000)], 300)
    tokenizer.save(tmp_path / "data/tokenizer")
    model = tiny_model(vocab_size=300)
    save_model(tmp_path / "data/model", model.config, model_tensors(model))
    return tmp_path


def code_of(page: str) -> CodeType:
    """The Python code of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return compile(code, page, "exec")


def test_the_classification_head_learns(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(code_of("docs/classification.md"), {})
    assert capsys.readouterr().out == "the function is slow. statement\nis the function slow? question\n"


def test_a_source_of_ones_own_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", {**sources.SOURCES})
    exec(code_of("docs/data.md"), {})
    params = sources.DownloadParams(source="my-books", sha256=None, max_bytes=None, encoding=None)
    assert sources.find_source(params.source).licence == "CC0-1.0"


def test_texts_are_generated(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(code_of("docs/generation.md"), {})
    assert capsys.readouterr().out.count("] length\n") == 2


def test_every_option_of_generation_is_in_its_page():
    page = (ROOT / "docs/generation.md").read_text()
    options = {field.name for cls in (Sampling, Search, Speculation) for field in dataclasses.fields(cls)}
    assert {name for name in options if f"`{name}`" not in page} == set()


def test_every_field_and_limit_of_the_server_is_in_its_page():
    page = (ROOT / "docs/server.md").read_text()
    assert {
        each.name for each in dataclasses.fields(Body) if f"`{each.name}`" not in page and each.name != "stream_options"
    } == set()
    for name, value in dataclasses.asdict(Limits()).items():
        (row,) = re.findall(rf"^\| `(?:--)?{re.sub('_', '[-_]', name)}` \| ([\d,]+) ", page, re.MULTILINE)
        assert int(row.replace(",", "")) == value, name


def test_the_page_of_params_is_that_of_params_yaml():
    assert (ROOT / "docs/params.md").read_text() == page(), "run `python -m docs.params`"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
