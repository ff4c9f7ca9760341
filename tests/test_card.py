"""What the model card measures: pictures spoilt as it says, and weights put in place whole."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import CIFAR10
from model import Net

REPOSITORY = Path(__file__).parents[1]
RECIPE = {"augment": ["crop", "flip"], "padding": 4, "cutmix": 0.5, "label_smoothing": 0.1, "batch_size": 500}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """The module, which writes into an empty folder instead of the repository's."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    card = importlib.import_module("card")
    monkeypatch.setattr(card, "MODEL", tmp_path / "model.py")
    monkeypatch.setattr(card, "WEIGHTS", tmp_path / "cifar10.pt")
    return card


def record(data: str = "cifar10", before: tuple[dict, ...] = (), seconds: float = 1, **settings) -> dict:
    """What is read of the metrics.json of a run of two epochs, of the given settings."""
    config = {"data_dir": None, "epochs": 2, "holdout": 0, "weights": None, "name": None, **RECIPE, **settings}
    history = {"epoch": [1, 2], "seconds": [seconds, 2 * seconds]}
    return {"data": data, "before": list(before), "history": history, "config": config}


def save_run(folder: Path, **settings) -> Net:
    """What ships of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save((net := Net()).state_dict(), folder / "model.pt")
    (folder / "metrics.json").write_text(json.dumps(record(**settings)))
    return net


def save_sibling(folder: Path, **settings) -> dict:
    """The record of a run that found a temperature of 0.5."""
    folder.mkdir(parents=True, exist_ok=True)
    other = {**record(holdout=5000, **settings), "temperature": 0.5}
    (folder / "metrics.json").write_text(json.dumps(other))
    return other


def test_each_corruption_spoils_more_with_its_strength_and_the_same_each_time(card):
    pictures = CIFAR10(train=False).subset(range(20))
    for name, (strengths, make) in card.CORRUPTIONS.items():
        spoilt = [card.spoilt(pictures, make(strength)).images.float() for strength in strengths]
        harm = [(images - pictures.images.float()).abs().mean().item() for images in spoilt]
        assert len(harm) == 5
        assert harm == sorted(harm), name
        assert harm[0] > 0, name
        assert torch.equal(card.spoilt(pictures, make(strengths[0])).images.float(), spoilt[0])


def test_brightness_and_noise_are_as_strong_as_they_say(card):
    grey = CIFAR10(train=False).subset(range(20))
    grey.images[:] = 100
    brighter = card.spoilt(grey, card.CORRUPTIONS["brightness (added, of 1)"][1](0.2)).images
    assert brighter.float().mean().item() == pytest.approx(151, abs=1)
    noisy = card.spoilt(grey, card.CORRUPTIONS["noise (standard deviation, of 255)"][1](10)).images
    assert noisy.float().std().item() == pytest.approx(10, rel=0.05)


def test_weights_of_a_run_ship_calibrated_with_their_sha256(card, tmp_path):
    run, sibling = tmp_path / "runs/a", tmp_path / "runs/b"
    net, other = save_run(run, data_dir="/home/me/data"), save_sibling(sibling, epochs=1)
    (tmp_path / "model.py").write_text('A = 1\nWEIGHTS_SHA256 = ""\n')
    card.ship([run], sibling)
    shipped = Net.from_pretrained(tmp_path / "cifar10.pt")
    for name, value in shipped.state_dict().items():
        assert torch.equal(value, net.state_dict()[name] / (0.5 if name == "fc.weight" else 1)), name
    digest = card.hashlib.sha256((tmp_path / "cifar10.pt").read_bytes()).hexdigest()
    assert (tmp_path / "model.py").read_text() == f'A = 1\nWEIGHTS_SHA256 = "{digest}"\n'
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        **record(name="a"),
        "mean_of": ["a"],
        "sibling": {**other, "config": {**other["config"], "name": "b"}},
    }

    test_set = CIFAR10(train=False).subset(range(10))  # one of each class
    result = card.measure(shipped, test_set)
    assert result["sha256"] == digest
    assert result["accuracy"] == pytest.approx(np.mean(list(result["per_class"].values())), abs=0.01)
    assert {name: list(row) for name, row in result["corrupted"].items()} == {
        name: [str(strength) for strength in strengths] for name, (strengths, _) in card.CORRUPTIONS.items()
    }
    assert json.dumps(result)
    assert {path.name for path in tmp_path.glob("*.png")} == {"reliability.png", "corruptions.png"}


def test_the_mean_of_several_runs_ships_with_the_records_of_all(card, tmp_path, monkeypatch):
    asked, images = [], torch.randn(100, 3, 32, 32)
    monkeypatch.setattr(card, "make_loaders", lambda config: asked.append(config) or ([(images, None)], None))
    (tmp_path / "model.py").write_text('WEIGHTS_SHA256 = ""\n')
    start = record(seconds=2)  # its name was the default one
    a = save_run(tmp_path / "a", weights="runs/start", before=[start], seconds=3)
    before = [start, record(weights="runs/start", seconds=3)]
    b = save_run(tmp_path / "b", weights="runs/a", before=before, seconds=4, augment=["crop", "flip", "corrupt"])
    other = save_sibling(tmp_path / "sibling")
    card.ship([tmp_path / "b", tmp_path / "a"], tmp_path / "sibling", "data")
    assert [(Path(config.data_dir).name, list(config.augment)) for config in asked] == [("data", ["crop", "flip"])]
    shipped = Net.from_pretrained(tmp_path / "cifar10.pt")
    for name, parameter in shipped.named_parameters():
        mean = (a.get_parameter(name) + b.get_parameter(name)) / 2
        assert torch.allclose(parameter, mean / (0.5 if name == "fc.weight" else 1), atol=1e-6), name
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["history"]["seconds"][0] for run in [*saved["before"], saved]] == [2, 4, 3]
    assert saved["mean_of"] == ["b", "a"]
    assert saved["sibling"]["temperature"] == other["temperature"]
    with pytest.raises(ValueError, match="each run counts once, got a, a"):
        card.ship([tmp_path / "a", tmp_path / "a"], tmp_path / "sibling")


def test_the_mean_of_networks_has_the_statistics_of_its_own_maps(card):
    nets, images = [Net(), Net()], torch.randn(200, 3, 32, 32)
    mean = card.mean_of([net.eval() for net in nets], [(images, None)])
    conv, norm = mean.c1[0].conv, mean.c1[0].bn
    maps = conv(images)
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, maps.var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("other", [{"cutmix": 0.0}, {"augment": ["crop"]}, {"data": "synthetic"}])
def test_a_run_of_another_recipe_or_data_calibrates_nothing(card, tmp_path, other):
    save_run(tmp_path / "a")
    save_sibling(tmp_path / "b", **other)
    with pytest.raises(ValueError, match=r"b is no sibling of .*a: (cutmix is|augment is|it trained on other images)"):
        card.ship([tmp_path / "a"], tmp_path / "b")
    save_run(tmp_path / "c")
    with pytest.raises(ValueError, match="c has no temperature: train it to its end with --holdout"):
        card.ship([tmp_path / "a"], tmp_path / "c")
    assert not (tmp_path / "cifar10.pt").exists()


@pytest.mark.parametrize(
    "run",
    [
        {"epochs": 3},
        {"data": "synthetic"},
        {"holdout": 5000},
        {"weights": "mine.pt"},
        {"weights": "runs/a/model.pt", "before": [record(), record(data="synthetic")]},
    ],
)
def test_unfinished_runs_and_those_on_other_images_do_not_ship(card, tmp_path, run):
    save_run(tmp_path, **run)
    save_sibling(tmp_path / "sibling")
    with pytest.raises(ValueError, match=r"of 3 epochs|synthetic|holdout 5000|began with (mine|runs/a/model).pt"):
        card.ship([tmp_path], tmp_path / "sibling")
    assert not (tmp_path / "cifar10.pt").exists()
