"""Probabilities, made right as often as they say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import few_images, plain, plain_network
from torch import nn
from torch.nn import functional as F

from dataset import CIFAR10, Images, make_loader
from model import Net
from train import choose_runtime, evaluate, fit, predict, resumed, temperature_of

pytestmark = pytest.mark.usefixtures("quick_curves")


@pytest.mark.parametrize("temperature", [0.4, 1, 3])
def test_the_temperature_is_found_by_which_logits_were_multiplied(temperature):
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert temperature_of((temperature * logits).log_softmax(1), labels) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_makes_the_labels_more_likely():
    torch.manual_seed(0)
    log_probs, labels = torch.randn(2000, 10).log_softmax(1), torch.randint(10, (2000,))
    log_probs[torch.arange(2000), labels] += 2
    best = temperature_of(log_probs, labels)
    losses = [F.cross_entropy(log_probs / (factor * best), labels) for factor in (0.97, 1, 1.03)]
    assert losses[1] == min(losses)


def test_a_few_images_without_a_mistake_do_not_make_it_certain():
    labels = torch.arange(10)
    log_probs = (4 * F.one_hot(labels, 10)).float().log_softmax(1)
    sure = (log_probs / temperature_of(log_probs, labels)).softmax(1).amax(1)
    assert 0.85 < sure.min() < 0.95


def test_held_out_images_calibrate_the_network_of_a_run_and_its_file():
    train_set, held_out = few_images().values()
    held_out.is_held_out = True
    history = fit(plain(epochs=2, batch_size=8, name="mine"), net := Net(), train_set=train_set, test_set=held_out)
    record, saved = json.loads(Path("runs/mine/metrics.json").read_text()), Net.from_pretrained("runs/mine")
    before = Net.from_pretrained("runs/mine/last.pt")
    assert torch.equal(saved.fc.weight, net.fc.weight)
    assert torch.allclose(saved.fc.weight * record["temperature"], before.fc.weight)
    loader = make_loader(held_out, 8, train=False)
    log_probs, labels = predict(before, loader, runtime=choose_runtime("cpu", "fp32"))
    assert record["temperature"] == pytest.approx(temperature_of(log_probs, labels))
    assert evaluate(saved, loader)[1] == history["test_accuracy"][-1]


def test_resuming_what_has_ended_calibrates_alike():
    train_set = CIFAR10().subset(range(16))
    fit(plain(epochs=1, batch_size=8, holdout=8, name="mine"), train_set=train_set)
    first = Path("runs/mine/model.pt").read_bytes()
    fit(resumed("runs/mine"), train_set=train_set)
    assert Path("runs/mine/model.pt").read_bytes() == first


@pytest.mark.parametrize(("held_out", "network"), [(False, Net), (True, plain_network)])
def test_the_test_set_calibrates_nothing_nor_is_another_network_touched(held_out, network):
    sets = few_images()
    sets["test_set"].is_held_out = held_out
    fit(plain(epochs=1, batch_size=8, name="mine"), net := network(), **sets)
    saved = torch.load("runs/mine/model.pt", weights_only=True)
    last = torch.load("runs/mine/last.pt", weights_only=True)["model"]
    assert all(
        torch.equal(saved[name], last[name]) and torch.equal(saved[name], net.state_dict()[name]) for name in saved
    )
    assert "temperature" not in json.loads(Path("runs/mine/metrics.json").read_text())


def test_images_of_ones_own_calibrate_too():
    images, labels = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8), torch.arange(60) % 2
    fit(plain(epochs=1, batch_size=20, holdout=20), Net(2), train_set=Images(images, labels, ["a", "b"]))
    assert json.loads(Path("runs/plain/metrics.json").read_text())["temperature"] > 0


def test_a_test_set_of_ones_own_is_none_that_was_held_out_whatever_the_settings_say():
    history = fit(plain(epochs=1, batch_size=8, holdout=4, name="mine"), Net(), **few_images())
    assert history["tested_on"] == ["test"]
    assert "temperature" not in json.loads(Path("runs/mine/metrics.json").read_text())


@pytest.fixture
def first_run(held_out_run):
    """The training images of a run that held out eight of them, with its folder in runs/first."""
    shutil.copytree(held_out_run, "runs/first")
    return CIFAR10().subset(range(24))


@pytest.mark.parametrize(("holdout", "seed", "apart"), [(8, 0, True), (4, 1, True), (12, 0, False)])
def test_images_that_the_first_weights_may_know_calibrate_nothing(first_run, holdout, seed, apart):
    settings = {"holdout": holdout, "seed": seed, "weights": "runs/first"}
    fit(plain(epochs=1, batch_size=8, name="next", **settings), train_set=first_run)
    assert ("temperature" in json.loads(Path("runs/next/metrics.json").read_text())) == apart


@pytest.mark.parametrize("metrics", [None, "{}", '{"accuracy": 0.9}', '{"before": [1], "data": "a"}', "[]"])
def test_held_out_images_calibrate_nothing_if_nobody_knows_what_the_weights_know(first_run, metrics, capsys):
    Path("elsewhere").mkdir()
    shutil.copy("runs/first/model.pt", "elsewhere/best.pt")
    if metrics:
        Path("elsewhere/metrics.json").write_text(metrics)
    fit(plain(epochs=1, batch_size=8, holdout=8, name="next", weights="elsewhere/best.pt"), train_set=first_run)
    assert "temperature" not in json.loads(Path("runs/next/metrics.json").read_text())
    assert "not calibrated: the weights that it began with may have been trained on" in capsys.readouterr().out


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_classifier_is_calibrated_whole(bias):
    net = Net().eval()
    net.fc = nn.Linear(186, 10, bias=bias)
    images = torch.randn(2, 3, 32, 32)
    before = net.logits(images)
    net.divide_logits(0.5)
    assert torch.allclose(net.logits(images), 2 * before, atol=1e-6)


def test_another_classifier_is_not_calibrated():
    net, sets = Net(), few_images()
    net.fc = nn.Sequential(nn.Linear(186, 20), nn.ReLU(), nn.Linear(20, 10))
    sets["test_set"].is_held_out = True
    fit(plain(epochs=1, batch_size=8, name="mine"), net, **sets)
    assert "temperature" not in json.loads(Path("runs/mine/metrics.json").read_text())


def test_one_class_is_certain_and_nothing_or_infinite_numbers_are_refused():
    assert temperature_of(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64)) == 1
    for log_probs in (torch.empty(0, 10), torch.tensor([[0.0, -torch.inf]])):
        with pytest.raises(ValueError, match="finite log-probabilities of at least one image"):
            temperature_of(log_probs, torch.zeros(len(log_probs), dtype=torch.int64))
