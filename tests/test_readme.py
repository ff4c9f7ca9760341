"""What the pages show is real: numbers are those of saved runs, commands parse, links lead somewhere, examples run."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from small_runs import small_network
from torch.utils.data import DataLoader, TensorDataset

import predict
import train
from machinery import checkpoint
from machinery.config import FREE, parse_args
from model import Net
from train import Config

REPOSITORY = Path(__file__).parents[1]
README, CARD = ((REPOSITORY / name).read_text() for name in ("README.md", "weights/README.md"))
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")), *sorted(REPOSITORY.glob("*/README.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.fixture
def publish(monkeypatch):
    """The module that writes the pages."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("publish")


def test_the_numbers_are_those_of_the_saved_runs(publish):
    for run in publish.saved_runs():
        assert publish.is_default(run)
        assert run["history"]["tested_on"] == ["test"] * run["config"]["epochs"]
    notebook = nbformat.read(REPOSITORY / "S9_Final.ipynb", as_version=4)
    assert "<!-- table -->" in README
    for text in [*(page.read_text() for page in PAGES), *(cell.source for cell in notebook.cells)]:
        assert publish.with_numbers(text) == text, "run `make readme`"


def test_results_takes_only_runs_of_the_default_recipe(publish, tmp_path, monkeypatch):
    run, *_ = publish.saved_runs()
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    for seed, changed in enumerate(({}, {"network": "MyNetwork"})):
        folder = tmp_path / f"runs/cifar10-seed{seed}-20261126-072420"
        folder.mkdir(parents=True)
        record = {**run, **changed}
        record["config"] = {**record["config"], "seed": seed, "data_dir": "/home/me/data"}
        (folder / "metrics.json").write_text(json.dumps(record))
    publish.take(tmp_path / "runs")
    assert [path.name for path in tmp_path.glob("*.json")] == ["cifar10-seed0.json"]
    assert "/home/me" not in (tmp_path / "cifar10-seed0.json").read_text()


def test_the_commands_shown_are_accepted(monkeypatch):
    Path("pets").mkdir()
    monkeypatch.setattr("machinery.config.folder_of", Path)
    commands = re.findall(r"train\.py (--(?!help).*?)(?:\s+#.*|`.*)?$", TEXT, re.MULTILINE)
    assert len(commands) > 5
    monkeypatch.setattr(checkpoint, "load", lambda path: {"result": {"config": dataclasses.asdict(Config())}})
    for command in commands:
        parse_args(command.split())
    for script in re.findall(r"python ([\w/]+\.py)", TEXT):
        assert (REPOSITORY / script).exists(), script
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_card_shows_the_commands_that_trained_the_weights(publish):
    shown = [parse_args(line.split()) for line in re.findall(r"^python train\.py (--name .*)$", CARD, re.MULTILINE)]
    *runs, last = publish.long_runs()
    records = [*runs, last, last["sibling"]]
    assert [config.name for config in shown] == [record["config"]["name"] for record in records]
    for config, record in zip(shown, records, strict=True):
        saved = record["config"]
        for field, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
            if field in saved and field not in (*FREE, "weights", "epochs"):
                assert saved[field] == value, (config.name, field)
        longer = re.search(rf"--resume runs/{config.name} --epochs (\d+)", CARD)
        assert len(record["history"]["epoch"]) == (int(longer[1]) if longer else config.epochs)
    assert f'make card RUN="{" ".join(f"runs/{name}" for name in last["mean_of"])}" SIBLING=runs/sibling' in CARD
    assert f"temperature of {last['sibling']['temperature']:.3f}" in CARD


def test_the_commands_of_predict_run(capsys):
    Path("holiday").mkdir()
    for name in ("photo.jpg", "holiday/beach.png"):
        Image.new("RGB", (60, 40)).save(name)
    commands = re.findall(r"^python predict\.py ((?!--weights).*?)(?:\s+[#>].*)?$", TEXT, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert predict.main(command.split()) == 0
        assert "beach.png" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_file_picture_and_heading_linked_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in set(re.findall(r"\]\((?!http)([^)]+)\)", text)):
        file, _, heading = path.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], path


def test_the_maps_name_every_file_and_only_what_is_there():
    named = re.findall(r"`([\w./]+)`", "".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)))
    for name in named:
        assert (REPOSITORY / name).exists(), name
    assert {module.name for module in REPOSITORY.glob("*.py")} <= set(named)
    for page in REPOSITORY.glob("docs/*.md"):
        assert f"](docs/{page.name})" in README, page
    benchmarks = REPOSITORY / "benchmarks"
    for script in re.findall(r"^\| `(\w+\.py)`", (benchmarks / "README.md").read_text(), re.MULTILINE):
        assert (benchmarks / script).exists(), script


def test_the_python_examples_run():
    my_network, net = small_network(), Net()
    train.fit(Config(name="NAME", epochs=1, batch_size=100, workers=0), my_network)
    Image.new("RGB", (60, 40)).save("photo.jpg")
    my_loader = DataLoader(TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 2), batch_size=10)
    small = {"epochs=40": "epochs=1, batch_size=100, workers=0", "epochs=2": "epochs=2, batch_size=100, workers=0"}
    small |= {"resnet18(num_classes=10)": "small_network()", "2 * 90": "2 * 2", "50_000": "200", "5_000": "50"}
    small |= {"range(5)": "range(1)", "range(3)": "range(1)"}
    given = {"small_network": small_network, "my_network": my_network, "images": torch.zeros(2, 3, 32, 32)}
    given |= dict.fromkeys(("my_loader", "validation_loader", "test_loader"), my_loader)
    found = {}
    for page in PAGES:
        torch.save(net.state_dict(), "runs/NAME/model.pt")
        names = found[str(page.relative_to(REPOSITORY))] = {"__name__": "__main__", **given}
        for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            needed = re.search(r"^# needs (\w+)", example)
            if not needed or importlib.util.find_spec(needed[1]):
                exec(re.sub("|".join(map(re.escape, small)), lambda found: small[found[0]], example), names)
    assert found["README.md"]["net"].fc.weight.shape == (2, net.fc.in_features)
    assert found["docs/bring-your-own.md"]["history"]["epoch"] == [1, 2]
    assert torch.equal(found["weights/README.md"]["log_probs"], Net.from_pretrained()(torch.zeros(2, 3, 32, 32)))
    assert Path("answers.png").stat().st_size > 1000
