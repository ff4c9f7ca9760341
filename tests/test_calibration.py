"""Probabilities, made right as often as they say."""

from pathlib import Path

import pytest
import torch
from small_runs import few_images, plain, record_of
from torch import nn
from torch.nn import functional as F

import train
from dataset import make_loader
from model import Net
from train import choose_runtime, evaluate, fit, predict, resumed, temperature_of


@pytest.mark.parametrize("temperature", [0.4, 1, 3])
def test_the_temperature_is_found_by_which_logits_were_multiplied_and_none_makes_the_labels_more_likely(temperature):
    logits = 2 * torch.randn(20_000, 10)
    labels = torch.distributions.Categorical(logits=logits).sample()
    log_probs = (temperature * logits).log_softmax(1)
    best = temperature_of(log_probs, labels)
    assert best == pytest.approx(temperature, rel=0.03)
    losses = [F.cross_entropy(log_probs / (factor * best), labels) for factor in (0.97, 1, 1.03)]
    assert losses[1] == min(losses)


def test_a_few_images_without_a_mistake_do_not_make_it_certain():
    labels = torch.arange(10)
    log_probs = (4 * F.one_hot(labels, 10)).float().log_softmax(1)
    sure = (log_probs / temperature_of(log_probs, labels)).softmax(1).amax(1)
    assert 0.85 < sure.min() < 0.95


def test_one_class_is_certain_and_nothing_or_infinite_numbers_are_refused():
    assert temperature_of(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64)) == 1
    for log_probs in (torch.empty(0, 10), torch.tensor([[0.0, -torch.inf]])):
        with pytest.raises(ValueError, match="finite log-probabilities of at least one image"):
            temperature_of(log_probs, torch.zeros(len(log_probs), dtype=torch.int64))


def test_a_linear_classifier_is_calibrated_whole_and_another_one_refused():
    net = Net().eval()
    net.fc = nn.Linear(186, 10)
    images = torch.randn(2, 3, 32, 32)
    before = net.logits(images)
    net.apply_temperature(0.5)
    assert torch.allclose(net.logits(images), 2 * before, atol=1e-6)
    net.fc = nn.Sequential(net.fc)
    with pytest.raises(TypeError, match=r"one nn\.Linear"):
        net.apply_temperature(0.5)


def test_validation_images_calibrate_a_fresh_net_and_a_run_that_has_ended_alike(monkeypatch):
    monkeypatch.setattr(train, "CALIBRATION_IMAGES", 8)
    sets = few_images(8, is_validation=True)
    history = fit(plain(epochs=1, batch_size=8, name="mine"), **sets)
    before, saved = Net.from_pretrained("runs/mine/last.pt"), Net.from_pretrained("runs/mine")
    temperature = record_of("mine")["temperature"]
    assert torch.allclose(saved.fc.weight * temperature, before.fc.weight)
    loader = make_loader(sets["test_set"], 8, train=False)
    log_probs, labels = predict(before, loader, runtime=choose_runtime("cpu", "fp32"))
    assert temperature == pytest.approx(temperature_of(log_probs, labels), rel=1e-4)
    assert evaluate(saved, loader)[1] == history["test_accuracy"][-1]
    written = Path("runs/mine/model.pt").read_bytes()
    fit(resumed("runs/mine"), **sets)
    assert Path("runs/mine/model.pt").read_bytes() == written


@pytest.mark.parametrize(
    ("is_validation", "model", "weights", "least"),
    [(False, None, None, 8), (True, Net, None, 8), (True, None, "pretrained", 8), (True, None, None, 500)],
)
def test_neither_test_images_nor_few_calibrate_nor_is_another_start_touched(
    monkeypatch, is_validation, model, weights, least
):
    monkeypatch.setattr(train, "CALIBRATION_IMAGES", least)
    config = plain(epochs=1, batch_size=8, weights=weights)
    history = fit(config, model and model(), **few_images(8, is_validation=is_validation))
    assert history["tested_on"] == ["held-out" if is_validation else "test"]
    saved, last = (torch.load(f"runs/plain/{name}", weights_only=True)["model"] for name in ("model.pt", "last.pt"))
    assert all(torch.equal(saved[name], last[name]) for name in saved)
    assert "temperature" not in record_of("plain")
