"""The notebooks run from top to bottom, and their two forms say the same."""

import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_source_and_notebook_are_in_step(path):
    """Mend with ``jupytext --to ipynb notebooks/NAME.py``."""
    notebook, source = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]


def test_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count]


def test_notebook_opens_in_colab(path):
    place = f"blob/main/{path.relative_to(ROOT).as_posix()}"
    assert place in nbformat.read(path, as_version=4).cells[0].source


@pytest.mark.slow
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_TINY", "1")
    monkeypatch.setenv("NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    monkeypatch.setenv("XLA_FLAGS", _with_one_device(os.environ["XLA_FLAGS"]))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 2
    assert sum('experts">' in data.get("text/html", "") for data in shown) == 2
    assert (tmp_path / "run" / "report.html").exists()


def _with_one_device(flags):
    return flags.replace("device_count=8", "device_count=1")
