"""The loops and `fit`, on the tiny data."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TEST_COUNT
from small_runs import few_images, plain, plain_network
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import train
from dataset import make_loaders
from machinery.device import Runtime
from model import Net
from train import (
    NonFiniteLossError,
    SettingError,
    choose_runtime,
    evaluate,
    fit,
    predict,
    recipe_optimizer,
    train_one_epoch,
)

PLAIN = Runtime(torch.device("cpu"), "fp32", channels_last=False)


def test_fit_learns_and_saves_what_it_returns(tiny_root):
    torch.manual_seed(0)
    model = Net()
    history = fit(plain(batch_size=20, augment=(), data_dir=tiny_root), model)
    assert history["epoch"] == [1, 2]
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert history["test_accuracy"][-1] > 40  # chance is 10
    folder = Path("runs/plain")
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["history"] == history
    assert saved["parameters"] == 2_034_040
    assert saved["config"]["seed"] == 0
    assert {"versions", "hardware", "wall_seconds", "runtime"} <= set(saved)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    loaded = Net()
    loaded.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    _, test_loader = make_loaders(plain())
    assert evaluate(loaded, test_loader, runtime=PLAIN)[1] == pytest.approx(history["test_accuracy"][-1])
    assert [path.name for path in folder.glob(".*")] == [".lock"]


def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers():
    weights = []
    for name, workers in (("a", 0), ("b", 1), ("c", 2)):
        model = plain_network()
        fit(plain(name=name, workers=workers), model)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_metrics_are_weighted_by_samples():
    scores = torch.randn(10, 10)
    labels = torch.arange(10)
    loader = DataLoader(TensorDataset(scores, labels), batch_size=4)  # 4, 4 and 2
    loss, accuracy = evaluate(nn.Identity(), loader, runtime=PLAIN)
    assert loss == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (scores.argmax(1) == labels).float().mean().item())


def test_training_loss_is_reported_without_smoothing_and_steps_once_per_batch():
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    model = plain_network()
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(frozen, lambda step: 1.0)
    loss, _ = train_one_epoch(model, loader, frozen, scheduler, runtime=PLAIN, label_smoothing=0.5)
    assert loss == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert scheduler.last_epoch == 3


def test_mixed_images_are_trained_on_with_mixed_labels():
    def mix(images, labels):
        shares = F.one_hot(labels, 10).float()
        return 0.6 * images + 0.4 * images.roll(1, 0), 0.6 * shares + 0.4 * shares.roll(1, 0)

    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    model, loader = plain_network(), DataLoader(TensorDataset(images, labels), batch_size=10)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, accuracy = train_one_epoch(model, loader, frozen, runtime=PLAIN, mix=mix)
    scores, shares = model(mix(images, labels)[0]), mix(images, labels)[1]
    assert loss == pytest.approx(-(shares * scores.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (scores.argmax(1) == labels).float().mean().item())


def test_cutmix_cuts_in_the_share_of_the_batches_that_it_says(monkeypatch):
    cut = []

    def look(*arguments, mix, **options):
        images, labels = torch.arange(20.0)[:, None, None, None].expand(20, 3, 32, 32), torch.arange(20) % 10
        torch.manual_seed(0)
        for _ in range(200):
            pixels, shares = mix(images, labels)
            own = (pixels == images).float().mean((1, 2, 3))
            torch.testing.assert_close(shares[range(20), labels] if shares.ndim == 2 else torch.ones(20), own)
            cut.append(own.min().item() < 1)
        return 0.0, 0.0

    monkeypatch.setattr(train, "train_one_epoch", look)
    fit(plain(epochs=1, cutmix=0.25), plain_network())
    assert 30 < sum(cut) < 70


def test_skipping_goes_by_the_loss_of_every_image_when_it_was_last_met(monkeypatch):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            met.append(len(x)) if self.training else None
            return self.linear(x.mean((2, 3)))

    met, loaders = [], []
    monkeypatch.setattr(train, "make_loaders", lambda *a, **k: loaders.append(make_loaders(*a, **k)) or loaders[0])
    config = plain(epochs=3, batch_size=64, augment=(), skip=0.5, lr=0)
    history = fit(config, model := Counting())
    assert met == [64, 64, 64, 8, 64, 36, 64, 64, 64, 8]
    train_set = loaders[0][0].dataset
    log_probs, labels = predict(model, DataLoader(train_set, 50), runtime=choose_runtime("cpu", "fp32"))
    expected = F.nll_loss(log_probs, labels, reduction="none")
    torch.testing.assert_close(loaders[0][0].sampler.losses, expected)
    assert history["train_loss"][1] > history["train_loss"][0] == pytest.approx(expected.mean().item())


def test_training_starts_from_the_weights_of_a_run():
    torch.manual_seed(1)
    start = Net()
    torch.save(start.state_dict(), "start.pt")
    ours, given = (plain(epochs=1, lr=0.01, batch_size=16, name=name) for name in ("ours", "given"))
    history = fit(dataclasses.replace(ours, weights="start.pt"), **few_images())
    assert history["train_loss"] == fit(given, start, **few_images())["train_loss"]
    with pytest.raises(SettingError, match="weights and a model of your own"):
        fit(plain(weights="start.pt", name="both"), Net())


def test_evaluation_changes_nothing_and_keeps_the_mode():
    model, (_, loader) = Net(), make_loaders(plain())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log_probs, labels = predict(model, loader, runtime=PLAIN)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(labels, loader.dataset.labels)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(TEST_COUNT))


def test_a_loss_that_is_not_finite_stops_the_run():
    model = plain_network()
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        fit(plain(), model)


def test_the_rate_falls_linearly_to_zero():
    assert fit(plain(epochs=4), plain_network())["lr"] == pytest.approx([0.12, 0.09, 0.06, 0.03])


def test_holdout_keeps_training_images_apart_and_the_test_set_out():
    train_loader, test_loader = make_loaders(plain(holdout=50))
    assert (len(train_loader.dataset), len(test_loader.dataset)) == (150, 50)
    trained = {image.numpy().tobytes() for image in train_loader.dataset.images}
    assert not trained & {image.numpy().tobytes() for image in test_loader.dataset.images}
    assert test_loader.dataset.augment == ()


def test_loaders_without_images_are_refused_and_those_without_a_length_are_not():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(3, 32, 32), 1)] * 6)

    model, empty = plain_network(), DataLoader(TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0).long()))
    optimizer = recipe_optimizer(model)
    with pytest.raises(ValueError, match="no images"):
        train_one_epoch(model, empty, optimizer)
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, empty)
    loss, _ = train_one_epoch(model, DataLoader(Endless(), batch_size=3), optimizer, progress=True)
    assert math.isfinite(loss)


def test_a_run_says_what_it_was_tested_on(capsys):
    assert fit(plain(epochs=1, name="a"), plain_network())["tested_on"] == ["test"]
    assert ", test " in capsys.readouterr().out
    assert fit(plain(epochs=1, name="b", holdout=50), plain_network())["tested_on"] == ["held-out"]
    assert ", held-out " in capsys.readouterr().out
