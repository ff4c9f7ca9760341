"""What is stopped goes on bit for bit, with its settings and its images, and is never overwritten unasked."""

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    few_images,
    files_of,
    plain,
    plain_network,
    quick,
    record_of,
    signal_at,
    small_network,
    timeless,
    weights,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import train
from dataset import CIFAR10, make_loaders
from machinery import checkpoint
from machinery.config import parse_args
from machinery.data.cifar10 import draw_synthetic
from machinery.data.images import facts_of
from machinery.record import known_of_data
from model import Net
from train import CheckpointError, SettingError, StoppedError, fit, resumed

WRITTEN = ["last.pt", "metrics.json", "model.pt"]  # but for the pictures


@pytest.mark.parametrize(("steps", "number"), [([1], 2), ([4], 15), ([6], 2), ([10], 15), ([2] * 5, 2)])  # 4, 3 and 4
def test_a_stopped_run_goes_on_bit_for_bit(uninterrupted, steps, number):
    config = quick()
    for step in steps:
        with pytest.raises(StoppedError, match=r"--resume runs.quick") as stopped:
            fit(config, signal_at(small_network(), step, number))
        assert stopped.value.signal == number
        config = quick(resume="runs/quick")
    history = fit(config, model := small_network())
    assert torch.equal(weights(model), uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])
    assert record_of("quick")["history"] == history
    assert files_of("quick") == WRITTEN


def test_a_run_knows_the_runs_before_it_and_goes_on_without_their_weights():
    torch.manual_seed(1)
    torch.save(Net().state_dict(), "start.pt")
    Path("metrics.json").write_text("[]")  # of something else
    settings = {"epochs": 1, "batch_size": 8}
    history = fit(plain(name="a", weights="start.pt", **settings), **few_images(8))
    given = fit(plain(name="given", **settings), Net.from_pretrained("start.pt"), **few_images(8))
    assert given["train_loss"] == history["train_loss"]
    fit(plain(name="b", weights="runs/a/model.pt", **settings), **few_images(8))
    before, after = record_of("a"), record_of("b")
    assert before.pop("before") == []
    assert after["before"] == [before]
    shutil.rmtree("runs/a")
    assert fit(resumed("runs/b", epochs=2), **few_images(8))["epoch"] == [1, 2]
    assert record_of("b")["before"] == [before]


def test_a_second_signal_leaves_at_once(monkeypatch):
    class Impatient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_network()

        def forward(self, x: Tensor) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(checkpoint.time, "monotonic", lambda: math.inf)
            os.kill(os.getpid(), signal.SIGINT)
            return self.net(x)

    with pytest.raises(KeyboardInterrupt):
        fit(quick(), Impatient())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def half() -> Path:
    """A run that was stopped in its second epoch."""
    with pytest.raises(StoppedError):
        fit(quick(lr=0.1), signal_at(small_network(), 6))
    return Path("runs/quick")


def test_the_command_line_goes_on_with_the_settings_of_the_run(half, monkeypatch, capsys):
    config = parse_args(["--resume", "runs/quick", "--workers", "1"])
    assert (config.lr, config.epochs, config.workers, config.resume) == (0.1, 3, 1, "runs/quick")
    after_the_epoch = (half / "model.pt").read_bytes()
    monkeypatch.setattr(train, "Net", lambda classes: signal_at(small_network(), 1, signal.SIGTERM))
    assert train.main(["--resume", "runs/quick"]) == 128 + signal.SIGTERM
    assert "python train.py --resume runs" in capsys.readouterr().err
    assert (half / "model.pt").read_bytes() == after_the_epoch
    assert train.main(["--resume", "runs/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no run to resume")  # without argparse's usage


def test_other_settings_another_name_or_network_are_refused_and_nothing_is_lost(half):
    before = (half / "last.pt").read_bytes()
    with pytest.raises(SettingError, match=r"lr 0.2 \(the run has 0.1\); seed 1 \(the run has 0\)"):
        fit(quick(resume="runs/quick", lr=0.2, seed=1), small_network())
    with pytest.raises(CheckpointError, match="does not fit this network"):
        fit(resumed(half), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    with pytest.raises(SettingError, match=r"epochs: a run with skip keeps its length.* one of 3, got 4"):
        fit(resumed(half, epochs=4), small_network())
    with pytest.raises(SettingError, match="goes on in its own folder, runs/quick; leave out name 'other'"):
        quick(resume="runs/quick", name="other")
    assert (half / "last.pt").read_bytes() == before


def test_more_epochs_follow_the_longer_schedule_and_fewer_are_refused(capsys):
    fit(quick(epochs=2, skip=0), small_network())
    history = fit(resumed("runs/quick", epochs=4), small_network())
    assert "epochs 2 -> 4" in capsys.readouterr().out
    assert history["epoch"] == [1, 2, 3, 4]
    assert history["lr"] == pytest.approx([0.12, 0.06, 0.06, 0.03])
    with pytest.raises(SettingError, match="is one of 4, got 3"):
        fit(resumed("runs/quick", epochs=3), small_network())
    assert fit(resumed("runs/quick"), small_network()) == history  # which has ended


def test_a_run_is_overwritten_only_when_told_and_when_the_new_one_has_saved():
    fit(quick(epochs=1), small_network())
    Path("runs/quick/notes.txt").write_text("mine")
    old = {name: Path("runs/quick", name).read_bytes() for name in WRITTEN}
    model = small_network()
    model.register_forward_hook(lambda *given: 1 / 0 if model.training else None)
    for config, error in ((quick(epochs=1), SettingError), (quick(overwrite=True), ZeroDivisionError)):
        with pytest.raises(error):
            fit(config, model)
        assert {name: Path("runs/quick", name).read_bytes() for name in WRITTEN} == old
    with pytest.raises(StoppedError):
        fit(quick(overwrite=True), signal_at(small_network(), 2))
    assert files_of("quick") == ["last.pt", "notes.txt"]
    with pytest.raises(SettingError, match="give one of them"):
        quick(overwrite=True, resume="runs/quick")


@pytest.mark.parametrize("name", ["train_set", "test_set"])
def test_other_images_or_labels_are_refused_by_what_they_are(name):
    sets = few_images()
    fit(plain(epochs=1, batch_size=8), plain_network(), **sets)
    same = CIFAR10(train=name == "train_set", augment=sets[name].augment)
    same = same.subset(range(len(sets[name])))
    assert fit(resumed("runs/plain"), plain_network(), **{**sets, name: same})["epoch"] == [1]
    same.labels[3] = (same.labels[3] + 1) % 10
    with pytest.raises(SettingError, match=f"resume: {name} has other images or labels"):
        fit(resumed("runs/plain"), plain_network(), **{**sets, name: same})


def test_a_folder_of_pictures_may_move_and_grow_and_keeps_its_split(capsys):
    def draw(places: range) -> None:
        for k, image in enumerate(draw_synthetic(train=True, count=places.stop)[0]):
            if k in places:
                Path(f"pets/kind {k % 2}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(f"pets/kind {k % 2}/{k}.png")

    def split() -> list[set]:
        items = checkpoint.load(Path("runs/plain/last.pt"))["items"]
        return [set(items[name].tolist()) for name in ("train_set", "test_set")]

    draw(range(40))
    fit(plain(data="pets", epochs=1, batch_size=8), plain_network(2))
    trained, validated = split()
    Path("pets").rename("moved")
    with pytest.raises(SettingError, match="data must be"):
        resumed("runs/plain")
    fit(resumed("runs/plain", data="moved", epochs=2), plain_network(2))
    assert "new pictures" not in capsys.readouterr().out
    Path("moved").rename("pets")
    draw(range(40, 60))
    fit(resumed("runs/plain", data="pets", epochs=3), plain_network(2))
    more, others = split()
    assert trained < more
    assert validated <= others
    assert not more & others
    out = capsys.readouterr().out
    assert f"note: train_set has {len(more - trained)} new pictures" in out
    config = plain(data="pets", batch_size=8, seed=1, weights="runs/plain")
    _, loader = make_loaders(config, known=known_of_data(config, None))
    assert facts_of(loader.dataset)["digest"] == record_of("plain")["test_set"]["digest"]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("pets/kind 0/0.png")
    with pytest.raises(SettingError, match="_set has other images or labels"):
        fit(resumed("runs/plain", epochs=4), plain_network(2))


@pytest.mark.parametrize(
    ("rate", "schedule"),
    [
        (np.float64(0.1), lambda optimizer: None),
        (0.1, lambda optimizer: LambdaLR(optimizer, lambda step: 0.5 + 0.5 * np.cos(step / 9))),
        (0.1, lambda optimizer: CosineAnnealingLR(optimizer, np.int64(6))),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_numpy_are_saved_so_that_they_are_read_again(rate, schedule):
    def parts() -> dict:
        optimizer = torch.optim.SGD((model := plain_network()).parameters(), lr=rate)
        return {"model": model, "optimizer": optimizer, "scheduler": schedule(optimizer), **few_images()}

    config = plain(lr=np.float64(0.1), epochs=np.int64(2), batch_size=16)
    assert [type(value) for value in (config.lr, config.epochs)] == [float, int]
    history = fit(config, **parts())
    assert fit(resumed("runs/plain"), **parts()) == history
    assert record_of("plain")["history"] == history


def test_a_state_that_could_not_be_read_again_is_refused_by_name_before_the_first_step():
    model = signal_at(plain_network(), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["label"] = dataclasses.make_dataclass("Label", ["name"])("a")
    with pytest.raises(CheckpointError, match=r"cannot save optimizer.param_groups.0.label, a .*Label"):
        fit(plain(), model, optimizer=optimizer)
    assert not Path("runs").exists()
