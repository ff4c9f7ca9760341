"""The notebook: short, free of definitions, committed from one clean run, and running top to bottom."""

import html
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

from machinery.notebook import page_of
from model import Net, receptive_field

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


def sides_seen_by_corners(net: Net) -> list[int]:
    """Of the parts of an image of 32x32 on which the first and the last place of the last map of C3 depend."""
    images = torch.rand(8, 3, 32, 32, requires_grad=True)
    for parameter in net.eval().parameters():
        nn.init.normal_(parameter)  # instead of filters that start as the identity, and look at one place
    maps = net.c3(net.c2(net.c1(images)))
    gradients = [torch.autograd.grad(maps[:, :, i, i].sum(), images, retain_graph=True)[0] for i in (0, -1)]
    return [int(gradient.abs().amax((0, 1, 2)).count_nonzero()) for gradient in gradients]


def test_the_numbers_in_the_text_are_those_of_the_network(notebook):
    text, net = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"), Net()

    def weights(*names: str) -> int:
        return sum(net.get_parameter(f"{name}.weight").numel() for name in names)

    separable = weights("c4.0.0.depthwise.conv", "c4.0.0.pointwise.conv")
    channels = len(net.get_parameter("c4.0.0.pointwise.conv.weight"))
    dense = 9 * channels**2
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    after, seen = receptive_field(net), min(sides_seen_by_corners(net))
    dilated = net.get_submodule("c3.0.0.conv")
    dilated.dilation = dilated.padding = (1, 1)
    before, less = receptive_field(net), max(sides_seen_by_corners(net))
    for claim in (
        f"{weights('c1.0.conv')} weights",
        f"{sum(p.numel() for norm in norms for p in norm.parameters()):,} of the 2,034,040 parameters",
        f"sees {after['c3']} pixels with it and {before['c3']} without",
        f"sees {seen} of the 32 rows and columns of the image or more, instead of {less} at most",
        f"From {channels} to {channels} channels that takes {separable:,} weights instead of the {dense:,} ",
        f"{dense / separable:.1f} times fewer",
        f"each of the {net.fc.in_features} maps",
        f"needs {weights('fc'):,} weights; on all positions it would need {16 * weights('fc'):,}",
        f"so it is {after['c1']} after C1; from there it grows to {after['c2']}, {after['c3']} and {after['c4']}",
    ):
        assert claim in text


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


def test_the_first_cell_says_what_to_do_where_the_modules_are_missing(notebook):
    assert re.search(r"`ModuleNotFoundError`[^.]* clone [^.]*repository", notebook.cells[0].source)


def test_runs_top_to_bottom_on_the_tiny_data(tiny_notebook, tmp_path):
    NotebookClient(tiny_notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(tiny_notebook) for output in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "2,034,040 parameters" in printed
    assert "epoch 1/1: train" in printed
