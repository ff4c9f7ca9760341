"""The README's figures are those of the saved run, and its commands are real."""

import json
import re
from pathlib import Path

from config import parse_args

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_accuracy_and_time_are_those_of_the_saved_run():
    saved = json.loads((REPOSITORY / "results" / "cifar10-seed0.json").read_text())
    history = saved["history"]
    assert saved["data"] == "cifar10"
    for figure in (
        f"**{history['test_accuracy'][-1]:.2f} %** (last epoch",
        f"{history['train_accuracy'][-1]:.2f} % (augmented",
        f"| {len(history['epoch'])} | {history['seconds'][-1]:,.0f} s on 2 cores",
        f"{saved['parameters']:,}",
    ):
        assert figure in README


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
