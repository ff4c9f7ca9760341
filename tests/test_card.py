"""What the model card measures, and which weights are published."""

import hashlib
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import CIFAR10
from model import Net

RECIPE = {"augment": ["crop", "flip"], "padding": 4, "cutmix": 0.5, "label_smoothing": 0.1, "batch_size": 500}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """The module, which writes into an empty folder instead of the repository's."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    card = importlib.import_module("card")
    monkeypatch.setattr(card, "MODEL", tmp_path / "model.py")
    monkeypatch.setattr(card, "WEIGHTS", tmp_path / "cifar10.pt")
    return card


def record_of(before: tuple[dict, ...] = (), seconds: float = 1, **settings) -> dict:
    """What is read of the metrics.json of a run of two epochs."""
    config = {"data_dir": "/mine", "epochs": 2, "holdout": 0, "weights": None, "name": None, **RECIPE, **settings}
    history = {"epoch": [1, 2], "seconds": [seconds, 2 * seconds]}
    record = {"data": "cifar10", "before": list(before), "config": config, "history": history}
    return record | ({"temperature": 0.5} if config["holdout"] else {})


def save_run(name: str, **settings) -> Net:
    Path(name).mkdir()
    torch.save((net := Net()).state_dict(), Path(name, "model.pt"))
    Path(name, "metrics.json").write_text(json.dumps(record_of(**settings)))
    return net


def test_each_corruption_is_as_strong_as_it_says_and_the_same_each_time(card):
    pictures = CIFAR10(train=False).subset(range(20))
    for name, (strengths, make) in card.CORRUPTIONS.items():
        corrupted = [card.corrupt(pictures, make(strength)).images.float() for strength in strengths]
        harm = [(images - pictures.images.float()).abs().mean().item() for images in corrupted]
        assert harm == sorted(harm), name
        assert harm[0] > 0, name
        assert torch.equal(card.corrupt(pictures, make(strengths[0])).images.float(), corrupted[0])
    pictures.images[:] = 100
    brighter = card.corrupt(pictures, card.CORRUPTIONS["brightness (added, of 1)"][1](0.2)).images
    assert brighter.float().mean().item() == pytest.approx(151, abs=1)
    noisy = card.corrupt(pictures, card.CORRUPTIONS["noise (standard deviation, of 255)"][1](10)).images
    assert noisy.float().std().item() == pytest.approx(10, rel=0.05)


def test_the_card_measures_accuracy_calibration_and_corruptions(card, tmp_path, monkeypatch):
    (tmp_path / "cifar10.pt").write_bytes(b"weights")
    monkeypatch.setattr(card, "CORRUPTIONS", {name: (s[:1], make) for name, (s, make) in card.CORRUPTIONS.items()})
    result = card.measure(Net.from_pretrained(), CIFAR10(train=False).subset(range(10)))  # one of each class
    assert result["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert result["accuracy"] == pytest.approx(np.mean(list(result["per_class"].values())), abs=0.01)
    assert {name: list(row) for name, row in result["corrupted"].items()} == {
        name: [str(strength) for strength in strengths] for name, (strengths, _) in card.CORRUPTIONS.items()
    }
    assert json.dumps(result)
    assert {path.name for path in tmp_path.glob("*.png")} == {"reliability.png", "corruptions.png"}


def test_the_calibrated_mean_of_runs_is_published_with_all_records(card, tmp_path, monkeypatch):
    images = torch.randn(100, 3, 32, 32)
    monkeypatch.setattr(card, "make_loaders", lambda config: ([(images, None)], None))
    (tmp_path / "model.py").write_text('A = 1\nWEIGHTS_SHA256 = ""\n')
    start = record_of(seconds=2)
    nets = [save_run("a", before=[start], weights="start"), save_run("b", before=[start], weights="start", seconds=3)]
    save_run("sibling", holdout=5000, epochs=1)
    card.publish_weights([Path("a"), Path("b")], Path("sibling"))
    published = Net.from_pretrained(tmp_path / "cifar10.pt")
    for name, parameter in published.named_parameters():
        mean = sum(net.get_parameter(name) for net in nets) / 2
        assert torch.allclose(parameter, mean / (0.5 if name == "fc.weight" else 1), atol=1e-6), name
    maps = published.c1[0].conv(images)
    assert torch.allclose(published.c1[0].bn.running_mean, maps.mean((0, 2, 3)), atol=1e-4)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["history"]["seconds"][0] for run in [*saved["before"], saved]] == [2, 1, 3]
    assert (saved["mean_of"], saved["sibling"]["temperature"]) == (["a", "b"], 0.5)
    assert "/mine" not in (tmp_path / "metrics.json").read_text()
    digest = hashlib.sha256((tmp_path / "cifar10.pt").read_bytes()).hexdigest()
    assert (tmp_path / "model.py").read_text() == f'A = 1\nWEIGHTS_SHA256 = "{digest}"\n'


def test_unfinished_runs_and_those_on_other_images_are_not_published(card):
    run, sibling = record_of(name="run"), record_of(holdout=5000)
    card.refuse_unfit([run], sibling)
    for other in (record_of(epochs=3), sibling, {**run, "data": "synthetic"}, {**run, "before": [{"data": "pets"}]}):
        with pytest.raises(ValueError, match="not trained to its end on all"):
            card.refuse_unfit([run, other], sibling)
    with pytest.raises(ValueError, match="no temperature"):
        card.refuse_unfit([run], run)
