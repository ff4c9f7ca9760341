"""The README's figures are those of the saved runs, and its commands are real."""

import importlib
import re
from pathlib import Path

from config import Config, parse_args

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_numbers_are_those_of_the_saved_runs(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "results")
    readme = importlib.import_module("readme")
    runs = readme.saved_runs()
    assert [run["config"]["seed"] for run in runs] == list(range(len(runs)))
    for run in runs:
        assert (run["data"], run["parameters"]) == ("cifar10", 2_034_040)
        assert run["history"]["tested_on"] == ["test"] * run["config"]["epochs"]
        assert run["config"]["epochs"] == Config().epochs
    assert readme.with_numbers(README, runs) == README
    assert f"**{sum(run['history']['test_accuracy'][-1] for run in runs) / len(runs):.2f} %**" in README


def test_the_commands_shown_are_accepted():
    commands = re.findall(r"^python train\.py (--(?!help).*?)\s+#", README, re.MULTILINE)
    assert commands
    for command in commands:
        parse_args(command.split())


def test_the_make_targets_shown_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_and_picture_named_is_there():
    for path in set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(re.findall(r"^\| `([\w./]+)`", README, re.M)):
        if "." in path or "/" in path:
            assert (REPOSITORY / path).exists(), path
