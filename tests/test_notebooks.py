"""The notebooks are committed without outputs, and each runs from first to last cell, with small settings."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from project import ROOT, corpus, set_params, workers
from project import SMALL as PARAMS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"SOURCE": "corpus.txt", "MAX_BYTES": 100_000, "N_EMBD": 32, "STEPS": 25, "VOCABULARIES": [300, 512]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The project as links, with a small corpus and small params, from which the notebooks start."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    for name in ("quickstart.py", "requirements.txt", "stages", "tinygpt", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "params.yaml", folder)
    small = {key: value for key, value in PARAMS.items() if key not in ("export.gguf", "model.n_layer")}
    set_params(folder, small | {"export.hf": False})  # no notebook shows it, and it would import transformers
    (folder / "corpus.txt").write_text(corpus(), encoding="utf-8")
    return folder


def small(notebook: Any) -> Any:
    """The notebook with SMALL in place of its own settings, which are in one cell."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    names = re.findall(r"^(\w+) =", cell.source, re.MULTILINE)
    cell.source = "\n".join(f"{name} = {SMALL[name]!r}" for name in names)
    return notebook


class Running(KernelManager):
    """The manager of a kernel that another process has started."""

    has_kernel = True


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[KernelManager]:
    """One kernel for all notebooks, in a process that has imported PyTorch already."""
    connection = str(tmp_path_factory.mktemp("kernel") / "connection.json")
    manager = Running(connection_file=connection, owns_kernel=False)
    manager.write_connection_file()
    process = workers().Process(target=run_kernel, args=(connection,), daemon=True)
    process.start()
    yield manager
    process.kill()
    process.join()


def run_kernel(connection: str) -> None:
    """Run a kernel as `python -m ipykernel` does."""
    from ipykernel.kernelapp import launch_new_instance

    os.environ.pop("DVC_ROOT", None)
    launch_new_instance(argv=["-f", connection, "--IPKernelApp.quiet=True"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder, kernel):
    notebook = small(nbformat.read(path, as_version=4))
    at = f"os.chdir({str(folder / 'notebooks')!r})\n%env PYTHONPATH={folder}"
    begin = f"%reset -f\nimport os, sys\nsys.path[0] = ''\n{at}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    NotebookClient(notebook, timeout=300, km=kernel).execute()
    outputs = [output for cell in notebook.cells[1:] for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if "Traceback" in output.get("text", "")]  # of a program that it ran


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=False) + "\n"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "google.colab" in code[0].source
    assert {cell.id for cell in notebook.cells} == {
        f"{path.stem.partition('_')[2]}-{i:02}" for i in range(len(notebook.cells))
    }


def test_links_in_the_notebooks_lead_to_files():
    for path in NOTEBOOKS:
        for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
