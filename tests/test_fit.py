"""What users bring to `fit` and the loops is taken, or refused in one sentence before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import few_images, plain, plain_network, signal_at, small_network, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import Dataset, TensorDataset

from dataset import CIFAR10, Images
from model import Net
from train import NonFiniteLossError, SettingError, StoppedError, evaluate, fit, predict, resumed, train_one_epoch


def images_of(count: int, classes: int, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % classes)


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def test_any_datasets_of_any_number_of_classes_with_cutmix():
    history = fit(plain(cutmix=1.0, batch_size=20), network(), train_set=images_of(60, 3), test_set=images_of(30, 3))
    assert history["data"] == ["your own"] * 2
    assert json.loads(Path("runs/plain/metrics.json").read_text())["classes"] is None


def test_a_net_is_made_for_the_classes_of_the_data_and_their_names_are_saved():
    train_set = Images(torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8), torch.arange(40) % 2, ("cat", "dog"))
    fit(plain(epochs=1, batch_size=20, holdout=10), train_set=train_set)
    assert json.loads(Path("runs/plain/metrics.json").read_text())["classes"] == ["cat", "dog"]
    assert torch.load("runs/plain/model.pt", weights_only=True)["fc.weight"].shape[0] == 2


def sgd(model: nn.Module, schedule: bool = True) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"optimizer": optimizer, "scheduler": CosineAnnealingLR(optimizer, 12) if schedule else None}


@pytest.mark.parametrize("schedule", [False, True])
def test_an_optimizer_of_ones_own_is_saved_and_resumed_bit_for_bit(schedule):
    whole = small_network()
    history = fit(plain(name="whole", epochs=3), whole, **sgd(whole, schedule))
    assert history["lr"][0] == 0.1
    assert (history["lr"][1] < 0.1) == schedule
    stopped = signal_at(small_network(), 5)
    with pytest.raises(StoppedError):
        fit(plain(epochs=3), stopped, **sgd(stopped, schedule))
    with pytest.raises(SettingError, match="begun with the optimizer SGD, got Muon"):
        fit(resumed("runs/plain"), small_network())
    again = small_network()
    assert fit(resumed("runs/plain/last.pt"), again, **sgd(again, schedule))["lr"] == history["lr"]
    assert torch.equal(weights(again), weights(whole))


def test_an_optimizer_or_scheduler_of_something_else_is_refused():
    model, other = network(10), network(10)
    for given, message in (
        ({"optimizer": torch.optim.SGD(other.parameters(), 0.1)}, "4 of its parameters are not of this model"),
        ({"scheduler": sgd(model)["scheduler"]}, "scheduler: it needs the optimizer"),
        ({**sgd(model), "scheduler": sgd(model)["scheduler"]}, "scheduler: it is of another optimizer"),
    ):
        with pytest.raises(SettingError, match=message):
            fit(plain(), model, **given)
    with pytest.raises(SettingError, match="an optimizer of your own needs the model"):
        fit(plain(), **sgd(model))
    assert not Path("runs").exists()


def test_whoever_listens_hears_of_every_epoch_when_it_is_saved():
    heard = []

    def listen(row: dict) -> None:
        heard.append(row)
        assert json.loads(Path("runs/plain/metrics.json").read_text())["history"]["epoch"][-1] == row["epoch"]

    history = fit(plain(), plain_network(), on_epoch=listen)
    assert [row["test_loss"] for row in heard] == history["test_loss"]


class Pairs(Dataset):
    def __init__(self, item: object, count: int = 40) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.item


class Answers(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.layer = answer, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


IMAGE = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Pairs((IMAGE, 3)), r"train_set: label 3 is not one of the network's 3 outputs|labels: label 3"),
        (TensorDataset(torch.zeros(40, 3, 32, 32), torch.arange(40) % 4), "train_set: label 3 is not one of"),
        (Pairs((IMAGE, 0), 0), "train_set: it is empty"),
        (Pairs(IMAGE), r"an item must be \(float tensor \(C, H, W\), label\), got a Tensor"),
        (Pairs((IMAGE, 0, 1)), "an item must be"),
        (Pairs({"image": IMAGE}), "got a dict"),
        (Pairs((IMAGE.byte(), 0)), r"got torch.uint8 \(3, 32, 32\)"),
        (Pairs((IMAGE[None], 0)), r"got torch.float32 \(1, 3, 32, 32\)"),
        (Pairs((IMAGE, 0.5)), "a label must be an integer, got 0.5"),
        (Pairs((torch.zeros(3, 8, 8), 0)), r"test_set: its images are \(3, 32, 32\)"),
    ],
)
def test_datasets_that_do_not_fit_are_refused_in_a_sentence(dataset, message):
    with pytest.raises((SettingError, ValueError), match=message):
        fit(plain(batch_size=20), network(), train_set=dataset, test_set=images_of(30, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Answers(lambda x: (x.mean((2, 3)), x)), r"one tensor \(N, classes\), got a tuple; wrap it"),
        (Answers(lambda x: {"out": x}), "got a dict"),
        (Answers(lambda x: x), r"got shape \(2, 3, 32, 32\)"),
        (nn.Linear(5, 5), r"model: it does not take images of shape \(2, 3, 32, 32\)"),
        (network().requires_grad_(False), "none of its parameters requires a gradient"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_a_sentence(model, message):
    with pytest.raises(SettingError, match=message):
        fit(plain(batch_size=20), model, train_set=images_of(60, 3), test_set=images_of(30, 3))
    assert not Path("runs").exists()


def test_a_last_batch_of_one_image_is_refused_where_the_network_cannot_take_it():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 3))
    sets = {"train_set": images_of(61, 3), "test_set": images_of(30, 3)}
    with pytest.raises(SettingError, match="the last batch of 61 images has only one"):
        fit(plain(batch_size=20), pooled, **sets)
    fit(plain(batch_size=20, epochs=1), network(), **sets)


class Viewed(nn.Module):
    """As the network reimplemented here and pytorch-cifar's LeNet: `view` needs contiguous maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(x.view(x.shape[0], -1))


def test_a_network_that_takes_contiguous_images_only_gets_them(capsys):
    torch.manual_seed(0)
    model = Viewed()
    fit(plain(), model)
    assert "fp32, contiguous" in capsys.readouterr().out
    torch.manual_seed(0)
    same = Viewed()
    fit(plain(name="same", layout="contiguous"), same)
    assert torch.equal(weights(model), weights(same))  # the trial moved neither statistics nor random states
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    evaluate(Viewed(), batch)
    train_one_epoch(Viewed(), batch, torch.optim.SGD(Viewed().parameters(), 0.1))


def test_a_compiled_network_trains_and_its_weights_load():
    torch.manual_seed(0)
    fit(plain(epochs=1, batch_size=16), torch.compile(Net(), backend="eager"), **few_images())
    assert Net.from_pretrained("runs/plain/model.pt").fc.out_features == 10
    assert json.loads(Path("runs/plain/metrics.json").read_text())["network"] == "Net"


def test_the_loops_take_lists_and_generators():
    model, batches = network(), [(torch.randn(5, 3, 8, 8), torch.arange(5) % 3) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert train_one_epoch(model, (batch for batch in batches), optimizer)[0] > 0
    assert evaluate(model, batches) == pytest.approx(evaluate(model, iter(batches)))
    narrow = [(images, labels.int()) for images, labels in batches]
    assert torch.equal(predict(model, narrow)[1], predict(model, batches)[1])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": 1, "labels": 2}, "a batch must be two tensors"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2)), r"got a tuple of 3"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, dtype=torch.long)), r"labels must be integers \(N,\).*squeeze"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([0, 3])), "label 3 is not one of the network's 3 outputs, 0 to 2"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([0, -1])), "label -1 is not"),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_a_sentence(batch, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        train_one_epoch(model, [batch], torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=message):
        evaluate(model, [batch])


def test_a_scheduler_that_needs_the_loss_is_refused():
    model = network(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="stepped after every batch"):
        train_one_epoch(model, [], optimizer, ReduceLROnPlateau(optimizer))
    with pytest.raises(SettingError, match="stepped after every batch"):
        fit(plain(), model, optimizer=optimizer, scheduler=ReduceLROnPlateau(optimizer))


def test_an_image_that_is_nan_is_found_by_its_batch():
    batches = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]
    batches[1][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="batch 2: answers are infinite or NaN"):
        evaluate(network(), batches)


def test_frozen_layers_keep_their_statistics():
    net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith(("fc", "c4"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    train_one_epoch(net, [(torch.randn(4, 3, 32, 32), torch.arange(4))], optimizer)
    moved = {name[:2] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"c4", "fc"}


def test_six_views_are_named_and_averaged():
    model, loader = network(), [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)]
    plain_answers, averaged = predict(model, loader)[0], predict(model, loader, views=6)[0]
    assert not torch.allclose(plain_answers, averaged)
    mirrored = predict(model, [(loader[0][0].flip(3), loader[0][1])], views=6)[0]
    torch.testing.assert_close(averaged, mirrored, rtol=0, atol=1e-2)  # the places that are moved to are others
    with pytest.raises(ValueError, match="views must be 1 or 6"):
        evaluate(model, loader, views=2)


def test_one_cycle_of_ones_own_over_the_images_of_ones_own():
    model = small_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = fit(
        plain(epochs=2, batch_size=50),
        model,
        train_set=CIFAR10(augment=("flip",)),
        test_set=CIFAR10(train=False),
        optimizer=optimizer,
        scheduler=OneCycleLR(optimizer, 1e-2, total_steps=8),
    )
    assert history["lr"][1] > history["lr"][0]


def test_fp16_trains_and_is_resumed_with_its_scale(capsys):
    whole, settings = small_network(), {"epochs": 3, "batch_size": 4, "precision": "fp16"}
    history = fit(plain(name="whole", **settings), whole, **few_images())
    assert "fp16" in capsys.readouterr().out
    assert history["train_loss"][-1] < history["train_loss"][0]
    stopped = signal_at(small_network(), 5)
    with pytest.raises(StoppedError):
        fit(plain(**settings), stopped, **few_images())
    assert torch.load("runs/plain/last.pt", weights_only=True)["scaler"]["scale"] == 65536
    again = small_network()
    fit(resumed("runs/plain"), again, **few_images())
    assert torch.equal(weights(again), weights(whole))


class Overflowing(nn.Module):
    """Answers beyond fp16's range, in the given steps of training, counted from 1."""

    def __init__(self, steps: range) -> None:
        super().__init__()
        self.net, self.steps, self.count = network(10), steps, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return self.net(x) * (1e6 if self.training and self.count in self.steps else 1)


def test_a_step_that_overflows_in_fp16_is_left_out_and_only_many_end_the_run():
    settings = {"batch_size": 4, "precision": "fp16"}
    history = fit(plain(epochs=3, **settings), Overflowing(range(2, 4)), **few_images())
    assert history["test_loss"][-1] < 2.4
    with pytest.raises(NonFiniteLossError, match="in every step"):
        fit(plain(name="all", epochs=10, **settings), Overflowing(range(1, 1000)), **few_images())


def test_ten_classes_of_ones_own_get_a_fresh_classifier():
    images, labels = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8), torch.arange(40) % 10
    given = {"train_set": Images(images, labels, [f"kind {k}" for k in range(10)]), "progress": False}
    fit(plain(epochs=1, batch_size=20, holdout=10, lr=0, weights="pretrained"), **given)
    trained, shipped = Net.from_pretrained("runs/plain"), Net.from_pretrained()
    assert torch.equal(trained.c1[0].conv.weight, shipped.c1[0].conv.weight)
    assert not torch.equal(trained.fc.weight, shipped.fc.weight)
    assert trained.classes == tuple(f"kind {k}" for k in range(10))


def test_a_test_set_alone_is_refused():
    with pytest.raises(SettingError, match="a test_set of your own needs a train_set"):
        fit(plain(), test_set=images_of(30, 3))
