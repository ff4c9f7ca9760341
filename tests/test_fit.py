"""What users bring to `fit` is taken, or refused in one sentence before anything is written."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import few_images, plain, plain_network, record_of, signal_at, small_network, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from dataset import CLASSES, MEAN, Images
from machinery import checkpoint
from model import Net
from train import DataError, NonFiniteLossError, SettingError, StoppedError, evaluate, fit, predict, resumed


def images_of(count: int, classes: int, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % classes)


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def own_sets(count: int = 60) -> dict:
    return {"train_set": images_of(count, 3), "test_set": images_of(30, 3)}


def sgd(model: nn.Module, schedule: Any = None) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"optimizer": optimizer, "scheduler": schedule and schedule(optimizer)}


def test_any_datasets_of_any_number_of_classes_with_cutmix():
    history = fit(plain(cutmix=1.0, batch_size=20), model := network(), **own_sets())
    assert history["data"] == ["your own"] * 2
    assert record_of("plain")["classes"] is None
    assert model.trained_on == {"classes": None, "size": None, "mean": None, "std": None}


@pytest.mark.parametrize("start", [None, "pretrained"])
def test_a_net_is_made_for_the_classes_of_the_data_whose_names_it_keeps(start):
    images, names = torch.randint(256, (32, 32, 32, 3), dtype=torch.uint8), [f"kind {k}" for k in range(10)]
    train_set = Images(images, torch.arange(32) % 10, names)
    sets = {"train_set": train_set.subset(range(16)), "test_set": train_set.subset(range(16, 32))}
    fit(plain(epochs=1, batch_size=16, lr=0, weights=start), **sets)
    trained, shipped = Net.from_pretrained("runs/plain"), Net.from_pretrained()
    assert torch.equal(trained.c1[0].conv.weight, shipped.c1[0].conv.weight) == (start == "pretrained")
    assert not torch.equal(trained.fc.weight, shipped.fc.weight)  # for its ten classes are others
    assert (trained.classes, trained.mean) == (tuple(names), list(train_set.mean))
    assert record_of("plain")["images"]["mean"] == list(train_set.mean)


@pytest.mark.parametrize("schedule", [None, lambda optimizer: CosineAnnealingLR(optimizer, 12)])
def test_an_optimizer_of_ones_own_is_saved_and_resumed_bit_for_bit_at_its_own_rate(schedule):
    settings = {"epochs": 3, "batch_size": 8}
    whole = small_network()
    history = fit(plain(name="whole", **settings), whole, **sgd(whole, schedule), **few_images())
    assert history["lr"][0] == 0.1
    assert (history["lr"][1] < 0.1) == bool(schedule)
    assert (record_of("whole")["optimizer"], record_of("whole")["history"]["lr"]) == ("SGD", history["lr"])
    stopped = signal_at(small_network(), 3)
    with pytest.raises(StoppedError):
        fit(plain(**settings), stopped, **sgd(stopped, schedule), **few_images())
    with pytest.raises(SettingError, match="begun with the optimizer SGD, got Muon"):
        fit(resumed("runs/plain"), small_network(), **few_images())
    again = small_network()
    assert fit(resumed("runs/plain/last.pt"), again, **sgd(again, schedule), **few_images())["lr"] == history["lr"]
    assert torch.equal(weights(again), weights(whole))


def test_an_optimizer_or_scheduler_of_something_else_is_refused():
    model, other = network(10), network(10)
    cosine = sgd(model, lambda optimizer: CosineAnnealingLR(optimizer, 12))
    for given, message in (
        (sgd(other), "4 of its parameters are not of this model"),
        ({"scheduler": cosine["scheduler"]}, "scheduler: it needs the optimizer"),
        ({**sgd(model), "scheduler": cosine["scheduler"]}, "scheduler: it is of another optimizer"),
        (sgd(model, ReduceLROnPlateau), "stepped after every batch"),
    ):
        with pytest.raises(SettingError, match=message):
            fit(plain(), model, **given)
    with pytest.raises(SettingError, match="an optimizer of your own needs the model"):
        fit(plain(), **cosine)
    with pytest.raises(SettingError, match="weights and a model of your own"):
        fit(plain(weights="pretrained"), model)
    with pytest.raises(SettingError, match="got test_set alone"):
        fit(plain(), test_set=images_of(30, 3))
    assert not Path("runs").exists()


def test_a_scheduler_is_compared_with_the_steps_of_the_run_before_and_after_loading_and_keeps_its_length():
    def go(config, total: int) -> dict:
        model = network()
        return fit(config, model, **own_sets(), **sgd(model, lambda o: OneCycleLR(o, 0.1, total_steps=total)))

    config = plain(batch_size=25)  # three steps an epoch
    with pytest.raises(SettingError, match="its total_steps are 4, and the run has 6 steps"):
        go(config, 4)
    assert not Path("runs").exists()
    history = go(config, 6)
    assert history["lr"][1] > history["lr"][0]
    with pytest.raises(SettingError, match="epochs: the run's own scheduler was made for 2, got 3"):
        go(resumed("runs/plain", epochs=3), 9)
    state = checkpoint.load(Path("runs/plain/last.pt"))
    state["scheduler"]["total_steps"] = 4
    Path("runs/plain/last.pt").write_bytes(checkpoint.packed(state))
    with pytest.raises(SettingError, match="its total_steps are 4"):
        go(resumed("runs/plain"), 6)


def test_whoever_listens_hears_of_every_epoch_when_it_is_saved():
    heard = []

    def listen(row: dict) -> None:
        heard.append(row)
        assert record_of("plain")["history"]["epoch"][-1] == row["epoch"]

    history = fit(plain(), plain_network(), on_epoch=listen)
    assert [row["test_loss"] for row in heard] == history["test_loss"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (TensorDataset(torch.randn(60, 3, 32, 32), torch.arange(60) % 4), r"train_set\[\d+\]: the label is 3, but"),
        (images_of(0, 3), "train_set: it is empty"),
        (images_of(60, 3, 8), r"test_set: its images are \(3, 32, 32\)"),
        (TensorDataset(torch.randn(60, 3, 32, 32)), r"train_set\[0\]: an item must be \(float tensor"),
    ],
)
def test_datasets_that_do_not_fit_are_refused_in_a_sentence(dataset, message):
    with pytest.raises((SettingError, DataError), match=message):
        fit(plain(batch_size=20), network(), train_set=dataset, test_set=images_of(30, 3))


class Scores(nn.Module):
    def __init__(self, scores) -> None:
        super().__init__()
        self.scores, self.layer = scores, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> object:
        return self.scores(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scores(lambda x: (x.mean((2, 3)), x)), r"one tensor \(N, classes\), got a tuple; wrap it"),
        (Scores(lambda x: x), r"got shape \(2, 3, 32, 32\)"),
        (nn.Linear(5, 5), r"model: it does not take images of shape \(2, 3, 32, 32\)"),
        (network().requires_grad_(False), "none of its parameters requires a gradient"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_a_sentence(model, message):
    with pytest.raises(SettingError, match=message):
        fit(plain(batch_size=20), model, **own_sets())
    assert not Path("runs").exists()


@pytest.mark.parametrize(("images", "skip"), [(61, 0), (60, 0.32)])  # 41 are left in the second epoch of the last
def test_a_last_batch_of_one_image_is_refused_where_the_network_cannot_take_it(images, skip):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 3))
    settings = plain(batch_size=20, epochs=3, skip=skip)
    with pytest.raises(SettingError, match="batch_size: the last batch of an epoch has only one image"):
        fit(settings, pooled, **own_sets(images))
    fit(settings, network(), **own_sets(images))


class Viewed(nn.Module):
    """As the network reimplemented here and pytorch-cifar's LeNet: `view` needs contiguous maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(x.view(x.shape[0], -1))


def test_a_network_that_takes_contiguous_images_only_gets_them(capsys):
    fit(plain(), model := Viewed())
    assert "fp32, contiguous" in capsys.readouterr().out
    fit(plain(name="same", layout="contiguous"), same := Viewed())
    assert torch.equal(weights(model), weights(same))  # the trial moved neither statistics nor random states
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    assert torch.equal(predict(model, batch)[1], batch[0][1])
    assert evaluate(model, batch, views=6)[0] > 0


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel, AveragedModel])
def test_a_wrapped_network_trains_and_it_and_its_file_know_the_data(wrap):
    fit(plain(epochs=1, batch_size=16), wrapped := wrap(plain_network()), **few_images())
    assert record_of("plain")["network"] == "Sequential"
    file = torch.load("runs/plain/model.pt", weights_only=True)
    plain_network().load_state_dict(file.pop("model"))
    assert file == checkpoint.trained_on(wrapped)
    assert (file["classes"], file["size"], file["mean"]) == (CLASSES, 32, list(MEAN))


def test_fp16_trains_and_is_resumed_with_its_scale_also_where_a_run_began_in_another_precision(monkeypatch, capsys):
    settings = {"epochs": 3, "batch_size": 4}
    whole = small_network()
    history = fit(plain(name="whole", precision="fp16", **settings), whole, **few_images())
    assert "fp16" in capsys.readouterr().out
    assert history["train_loss"][-1] < history["train_loss"][0]
    for name, began in (("same", "fp16"), ("other", "fp32")):
        monkeypatch.setattr("machinery.device.fastest_precision", lambda device, began=began: began)
        with pytest.raises(StoppedError):
            fit(plain(name=name, precision="auto", **settings), signal_at(small_network(), 5), **few_images())
        scale = torch.load(f"runs/{name}/last.pt", weights_only=True)["scaler"]
        assert scale.get("scale") == (65536 if began == "fp16" else None)
        monkeypatch.setattr("machinery.device.fastest_precision", lambda device: "fp16")
        fit(resumed(f"runs/{name}"), again := small_network(), **few_images())
        assert torch.equal(weights(again), weights(whole)) == (name == "same")
        assert ("note: the run began with other runtime" in capsys.readouterr().out) == (name == "other")


class Overflowing(nn.Module):
    """Scores beyond fp16's range, in the given steps of training, counted from 1."""

    def __init__(self, steps: range) -> None:
        super().__init__()
        self.net, self.steps, self.count = network(10), steps, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return self.net(x) * (1e6 if self.training and self.count in self.steps else 1)


def test_a_step_that_overflows_in_fp16_is_left_out_and_only_many_end_the_run():
    settings = {"batch_size": 4, "precision": "fp16"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a scheduler that was stepped before the optimizer
        history = fit(plain(epochs=3, **settings), Overflowing(range(1, 3)), **few_images())
    assert history["test_loss"][-1] < 2.4
    assert checkpoint.load(Path("runs/plain/last.pt"))["scheduler"]["last_epoch"] == 10
    with pytest.raises(NonFiniteLossError, match="in every step"):
        fit(plain(name="all", epochs=10, **settings), Overflowing(range(1, 1000)), **few_images())
