"""The README's figures are those of the saved runs, and its commands are real."""

import base64
import importlib
import json
import re
from pathlib import Path

import nbformat

from config import parse_args

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_numbers_are_those_of_the_saved_runs(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "results")
    collect, readme = importlib.import_module("collect"), importlib.import_module("readme")
    runs = readme.saved_runs()
    assert [run["config"]["seed"] for run in runs] == list(range(len(runs)))
    for run in runs:
        assert (run["data"], run["parameters"]) == ("cifar10", 2_034_040)
        assert run["history"]["tested_on"] == ["test"] * run["config"]["epochs"]
        assert collect.is_default(run)
    for path in readme.READMES:
        assert readme.with_numbers(path.read_text(), runs) == path.read_text(), f"{path} is old: run `make readme`"
    assert f"**{sum(run['history']['test_accuracy'][-1] for run in runs) / len(runs):.2f} %**" in README


def test_the_committed_notebook_and_the_picture_of_mistakes_are_the_run_of_seed_0():
    notebook = nbformat.read(REPOSITORY / "S9_Final.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    history = json.loads((REPOSITORY / "results/cifar10-seed0.json").read_text())["history"]
    epochs = re.findall(r"^epoch \d+/\d+: train ([\d.]+) % .*?, test ([\d.]+) %", printed, re.MULTILINE)
    saved = zip(history["train_accuracy"], history["test_accuracy"], strict=True)
    assert epochs == [(f"{train:.2f}", f"{test:.2f}") for train, test in saved]
    pictures = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert (REPOSITORY / "results/misclassified.png").read_bytes() == pictures[-1]


def test_the_commands_shown_are_accepted():
    commands = re.findall(r"^python train\.py (--(?!help|resume).*?)\s+#", README, re.MULTILINE)
    assert commands
    for command in commands:
        parse_args(command.split())


def test_the_make_targets_shown_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_and_picture_named_is_there():
    for path in set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(re.findall(r"^\| `([\w./]+)`", README, re.M)):
        if "." in path or "/" in path:
            assert (REPOSITORY / path).exists(), path
