"""The loops, and what `fit` saves, on the tiny data."""

import math
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_COUNT
from small_runs import few_images, files_of, plain, plain_network, record_of, small_network, weights
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import train
from dataset import CLASSES, make_loaders
from machinery.device import Runtime
from machinery.run import FILES
from model import Net
from train import NonFiniteLossError, choose_runtime, evaluate, fit, predict, recipe_optimizer, train_one_epoch

PLAIN = Runtime(torch.device("cpu"), "fp32", channels_last=False)


@pytest.mark.usefixtures("drawing")
def test_fit_learns_and_saves_what_it_returns_and_what_was_used(tiny_root):
    config = plain(batch_size=20, data_dir=tiny_root)
    history = fit(config, model := small_network())
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert files_of("plain") == sorted(FILES)
    folder = Path("runs/plain")
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in (folder / "summary.txt").read_text()
    saved = record_of("plain")
    assert (saved["history"], saved["data"], saved["optimizer"]) == (history, "cifar10", "Muon")
    assert {"versions", "hardware", "wall_seconds", "runtime", "code"} <= set(saved)
    used = saved["train_set"]
    assert (used["source"], used["length"], used["augment"]) == ("cifar10", TRAIN_COUNT, list(config.augment))
    assert used["digest"] != saved["test_set"]["digest"]
    file, last = (torch.load(folder / name, weights_only=True) for name in ("model.pt", "last.pt"))
    assert model.trained_on["classes"] == CLASSES
    for name, value in model.trained_on.items():
        assert (file[name], last[name]) == (value, value)
    loaded = small_network()
    loaded.load_state_dict(file["model"])
    assert evaluate(loaded, make_loaders(plain())[1], runtime=PLAIN)[1] == pytest.approx(history["test_accuracy"][-1])


@pytest.mark.usefixtures("drawing")
def test_a_picture_that_cannot_be_drawn_is_a_warning_and_the_network_is_there(monkeypatch, capsys):
    for name in ("plot_curves", "plot_confusion", "plot_misclassified", "show_summary"):
        monkeypatch.setattr(f"utils.{name}", lambda *arguments: 1 / 0)
    fit(plain(epochs=1), plain_network())
    assert capsys.readouterr().out.count("cannot be made: division by zero") == 4
    assert files_of("plain") == ["last.pt", "metrics.json", "model.pt"]


def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers():
    results = []
    for workers in (0, 2):
        settings = {"augment": ("crop", "trivial"), "workers": workers}
        fit(plain(name=f"with {workers}", **settings), model := plain_network())
        results.append(weights(model))
    assert torch.equal(*results)


def test_metrics_are_weighted_by_samples():
    scores, labels = torch.randn(10, 10), torch.arange(10)
    loader = DataLoader(TensorDataset(scores, labels), batch_size=4)  # 4, 4 and 2
    loss, accuracy = evaluate(nn.Identity(), loader, runtime=PLAIN)
    assert loss == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (scores.argmax(1) == labels).float().mean().item())


def test_training_loss_is_reported_without_smoothing_and_steps_once_per_batch():
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    model = plain_network()
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = LambdaLR(frozen, lambda step: 1.0)
    loss, _ = train_one_epoch(model, loader, frozen, scheduler, runtime=PLAIN, label_smoothing=0.5)
    assert loss == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert scheduler.last_epoch == 3
    with pytest.raises(TypeError, match="stepped after every batch"):
        train_one_epoch(model, loader, frozen, ReduceLROnPlateau(frozen))


def test_mixed_images_are_trained_on_with_mixed_labels():
    def mix(images, labels):
        shares = F.one_hot(labels, 10).float()
        return 0.6 * images + 0.4 * images.roll(1, 0), 0.6 * shares + 0.4 * shares.roll(1, 0)

    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    model = plain_network()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, accuracy = train_one_epoch(model, [(images, labels)], frozen, runtime=PLAIN, mix=mix)
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
    history = fit(plain(epochs=3, augment=(), skip=0.5, lr=0), model := Counting())
    assert met == [64, 64, 64, 8, 64, 36, 64, 64, 64, 8]
    train_set = loaders[0][0].dataset
    log_probs, labels = predict(model, DataLoader(train_set, 50), runtime=choose_runtime("cpu", "fp32"))
    expected = F.nll_loss(log_probs, labels, reduction="none")
    torch.testing.assert_close(loaders[0][0].sampler.losses, expected)
    assert history["train_loss"][1] > history["train_loss"][0] == pytest.approx(expected.mean().item())


def test_evaluation_changes_nothing_and_keeps_the_mode_of_every_submodule():
    model, batches = small_network(), [(torch.randn(20, 3, 32, 32), torch.arange(20) % 10)]
    model[1].eval()
    modes, before = [module.training for module in model.modules()], weights(model)
    log_probs, labels = predict(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(weights(model), before)
    assert torch.equal(labels, batches[0][1])
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(20))


def test_a_loss_that_is_not_finite_stops_the_run_and_such_an_image_is_found_by_its_batch():
    model = plain_network()
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        fit(plain(), model)
    batches = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]
    batches[1][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="batch 2: predictions are infinite or NaN"):
        evaluate(plain_network(), batches)


def test_the_rate_falls_linearly_to_zero():
    assert fit(plain(epochs=4), small_network())["lr"] == pytest.approx([0.12, 0.09, 0.06, 0.03])


def test_loaders_without_images_are_refused_and_those_without_a_length_are_not():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(3, 32, 32), 1)] * 6)

    model = plain_network()
    optimizer = recipe_optimizer(model)
    for loop in (lambda batches: train_one_epoch(model, batches, optimizer), lambda batches: evaluate(model, batches)):
        with pytest.raises(ValueError, match="no images"):
            loop([])
    loss, _ = train_one_epoch(model, DataLoader(Endless(), batch_size=3), optimizer, progress=True)
    assert math.isfinite(loss)


def test_the_loops_take_lists_and_generators():
    model, batches = plain_network(), [(torch.randn(5, 3, 8, 8), torch.arange(5)) for _ in range(3)]
    assert train_one_epoch(model, (batch for batch in batches), recipe_optimizer(model))[0] > 0
    narrow = [(images, labels.int()) for images, labels in batches]
    assert torch.equal(predict(model, narrow)[1], predict(model, iter(batches))[1])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": 1, "labels": 2}, "a batch must be two tensors"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2)), r"got a tuple of 3"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, dtype=torch.long)), r"labels must be integers \(N,\).*squeeze"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([0, 10])), "label 10 is not one of the network's 10 outputs, 0 to 9"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([0, -1])), "label -1 is not"),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_a_sentence(batch, message):
    model = plain_network()
    with pytest.raises(ValueError, match=message):
        train_one_epoch(model, [batch], recipe_optimizer(model))
    with pytest.raises(ValueError, match=message):
        evaluate(model, [batch])


def test_frozen_layers_keep_their_statistics():
    net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith(("fc", "c4"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train_one_epoch(net, [(torch.randn(4, 3, 32, 32), torch.arange(4))], recipe_optimizer(net))
    moved = {name[:2] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"c4", "fc"}


def test_six_views_are_averaged_and_their_probabilities_sum_to_1():
    model, (images, labels) = plain_network(), (torch.randn(6, 3, 32, 32), torch.arange(6))
    averaged = predict(model, [(images, labels)], views=6)[0]
    assert not torch.allclose(predict(model, [(images, labels)])[0], averaged)
    torch.testing.assert_close(averaged.exp().sum(1), torch.ones(6))
    mirrored = predict(model, [(images.flip(3), labels)], views=6)[0]
    torch.testing.assert_close(averaged, mirrored, rtol=0, atol=1e-2)  # the places that are moved to are others
    with pytest.raises(ValueError, match="views must be 1 or 6"):
        evaluate(model, [(images, labels)], views=2)


def test_a_network_that_returns_probabilities_is_warned_of():
    model, sets = nn.Sequential(plain_network(), nn.Softmax(1)), few_images()
    with pytest.warns(UserWarning, match="the network returns probabilities"):
        predict(model, [(torch.randn(2, 3, 32, 32), torch.arange(2))])
    with pytest.warns(UserWarning, match="the network returns probabilities"):
        fit(plain(epochs=1, batch_size=16), model, **sets)
