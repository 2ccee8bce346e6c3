"""What the documents show, run as it stands there."""

import re
import subprocess
import sys

import pytest
from conftest import prose, tiny_model
from project import ROOT, environment

from tinygpt.model.weights import model_tensors, save_model
from tinygpt.tokenizer.bpe import train_bpe


@pytest.fixture
def folder(tmp_path):
    """data/model and data/tokenizer as the pipeline leaves them, the model with random weights."""
    tokenizer = train_bpe([prose(2000)], 300)
    tokenizer.save(tmp_path / "data/tokenizer")
    model = tiny_model(vocab_size=300)
    save_model(tmp_path / "data/model", model.config, model_tensors(model))
    return tmp_path


def test_the_classification_head_learns(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/classification.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the function is slow. statement\nis the function slow? question\n"
