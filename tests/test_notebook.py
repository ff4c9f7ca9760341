"""The notebook: short, free of definitions, committed from one clean run, and right for any data and order of cells."""

import html
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib.figure import Figure
from small_runs import signal_at
from torch import nn

from machinery.notebook import page_of
from model import Net, receptive_field
from train import StoppedError

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
    assert sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown") <= 1800


def test_is_committed_from_one_clean_run(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6


def test_every_figure_is_described_also_in_the_page_made_of_it(notebook):
    figures = [cell for cell in code_cells(notebook) if any("image/png" in o.get("data", {}) for o in cell.outputs)]
    descriptions = [cell.metadata.get("alt", "") for cell in figures]
    assert len(set(descriptions)) == len(figures)
    assert all(len(alt) > 40 for alt in descriptions)
    for cell in notebook.cells:  # the text between them takes a while to convert, and has no pictures
        cell.source = ""
    found = re.findall(r"<img alt=\"([^\"]*)\"", page_of(notebook, "S9_Final"))
    assert [html.unescape(alt) for alt in found] == descriptions


def test_the_numbers_in_the_text_are_those_of_the_network(notebook):
    text, net = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"), Net()

    def weights(*names: str) -> int:
        return sum(net.get_parameter(f"{name}.weight").numel() for name in names)

    separable = weights("c4.0.0.depthwise.conv", "c4.0.0.pointwise.conv")
    channels = len(net.get_parameter("c4.0.0.pointwise.conv.weight"))
    dense = 9 * channels**2
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    after = receptive_field(net)
    dilated = net.get_submodule("c3.0.0.conv")
    dilated.dilation = dilated.padding = (1, 1)
    before = receptive_field(net)
    for claim in (
        f"{weights('c1.0.conv')} weights",
        f"{sum(p.numel() for norm in norms for p in norm.parameters()):,} of the 2,034,040 parameters",
        f"sees {after['c3']} pixels with it and {before['c3']} without",
        f"From {channels} to {channels} channels that takes {separable:,} weights instead of the {dense:,} ",
        f"{dense / separable:.1f} times fewer",
        f"each of the {net.fc.in_features} maps",
        f"needs {weights('fc'):,} weights; on all positions it would need {16 * weights('fc'):,}",
        f"so it is {after['c1']} after C1; from there it grows to {after['c2']}, {after['c3']} and {after['c4']}",
    ):
        assert claim in text


class Session:
    """A kernel's stand-in, in this process: runs cells in any order, which share their variables."""

    def __init__(self, notebook: nbformat.NotebookNode, **parameters: Any) -> None:
        self.sources, self.figures = [cell.source for cell in code_cells(notebook)], 0
        self.variables: dict[str, Any] = {}
        self.run(0, 1)
        self.variables |= {"display": self.show, **parameters}

    def show(self, result: object) -> None:
        self.figures += isinstance(result, Figure)

    def run(self, *numbers: int) -> None:
        for source in (self.sources[k] for k in numbers):
            lines = source.splitlines()
            last = f"show({lines[-1]})" if lines[-1].startswith("plot_") else lines[-1]  # as a cell shows its result
            exec("\n".join([*lines[:-1], last]), self.variables | {"show": self.show}, self.variables)


def test_a_change_in_the_first_cell_counts_where_only_later_cells_run_again_also_after_an_interrupt(
    tiny_notebook, pictures, capsys
):
    session = Session(tiny_notebook)
    training = next(k for k, source in enumerate(session.sources) if "fit(" in source)
    session.run(*range(2, training))
    session.variables |= {"data": str(pictures), "epochs": 2, "batch_size": 13}
    session.variables["Net"] = lambda classes: signal_at(Net(classes), 2)
    with pytest.raises(StoppedError) as stopped:
        session.run(training)
    folder = re.search(r'resume = "(.+)"', str(stopped.value))
    assert folder
    session.variables |= {"Net": Net, "resume": folder[1]}
    session.run(*range(training, len(session.sources)))
    assert session.variables["history"]["epoch"] == [1, 2]
    assert session.variables["model"].fc.out_features == 13
    assert session.variables["test_set"].classes == tuple(f"class {k:02}" for k in range(13))
    shown, figures = capsys.readouterr().out, session.figures
    assert "200 training and 100 test images of cifar10" in shown
    assert "2 steps" in shown
    assert "skipped: the pretrained network knows the classes of CIFAR-10 only" in shown
    session.run(2, 3)  # the first figures, now of the same pictures
    assert (figures, session.figures) == (8, 10)
    assert "images of " + str(pictures) in capsys.readouterr().out
