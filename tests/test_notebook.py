"""The notebook: short, free of definitions, committed from one clean run, and running top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "S9_Final.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_short_and_defines_nothing(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    assert len(code_cells(notebook)) <= 15
    assert len(lines) <= 80
    assert not [line for line in lines if line.lstrip().startswith(("def ", "class "))]
    assert NOTEBOOK.stat().st_size < 500_000


def test_is_committed_from_one_clean_run(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6


def test_runs_top_to_bottom_on_the_tiny_data(tiny_notebook, tmp_path):
    NotebookClient(tiny_notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(tiny_notebook) for output in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "2,034,040 parameters" in printed
    assert "epoch 2/2: train" in printed
