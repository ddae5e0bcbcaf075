"""The notebooks run from top to bottom, and their two forms say the same."""

import html
import json
import os
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


RUN = "report.html", "What the choice of experts depends on"
SHOWN = {
    "01_quickstart": (2, 'experts">', 2, *RUN),
    "02_write_your_own_router": (4, "SecondIfClose", 1, *RUN),
    "03_do_harder_tokens_need_more_experts": (
        3, 'experts">', 1, "study.html", "Do harder tokens get more experts?",
    ),
    "04_surgery": (1, "kv bytes per token", 1, "moe/surgery.html", "promises to keep the function"),
}  # fmt: skip
"""Of each notebook: its pictures, how many pieces of HTML have such a text, and the page that it
leaves, with a text there."""


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
    pictures, text, pieces, page, heading = SHOWN[path.stem]
    assert sum("image/png" in data for data in shown) == pictures
    pieces_of_html = [data.get("text/html", "") for data in shown]
    assert sum(text in piece for piece in pieces_of_html) == pieces
    assert heading in (tmp_path / "run" / page).read_text(encoding="utf-8")
    assert not [s for s in _sentences(tmp_path / "run") if s not in "".join(pieces_of_html)]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "\x1b" not in printed, "a notebook is no terminal"


def test_the_router_of_the_notebook_is_that_of_the_documents():
    cells = nbformat.read(ROOT / "notebooks" / "02_write_your_own_router.ipynb", as_version=4).cells
    (written,) = [cell.source for cell in cells if cell.source.startswith("%%writefile")]
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert written.split("\n", 1)[1] == code.rstrip()
    assert len(code.splitlines()) <= 40


def _sentences(workdir):
    """Results of a study, as its page has them; none of another run."""
    path = workdir / "study.json"
    answers = json.loads(path.read_text(encoding="utf-8"))["answers"] if path.exists() else []
    return [html.escape(answer["sentence"]) for answer in answers]


def _with_one_device(flags):
    return flags.replace("device_count=8", "device_count=1")
