"""Trained weights are found, checked and loaded, or refused by name."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import model
from model import Net, WeightsError
from train import evaluate, recipe_optimizer, train_one_epoch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """Weights in half precision where those that ship are looked for, as they ship."""
    torch.manual_seed(1)
    file = tmp_path / "cifar10.pt"
    state = {name: v.half() if v.is_floating_point() else v for name, v in Net().state_dict().items()}
    torch.save(state, file)
    monkeypatch.setattr(model, "WEIGHTS", file)
    monkeypatch.setattr(model, "WEIGHTS_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_weights_are_loaded_in_eval_mode_and_full_precision(saved):
    net, expected = Net.from_pretrained(), torch.load(saved, weights_only=True)
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
        assert value.dtype in (torch.float32, torch.int64)


def test_the_random_state_is_as_before(saved):
    state = torch.get_rng_state()
    Net.from_pretrained()
    assert torch.equal(state, torch.get_rng_state())


def test_another_number_of_classes_gets_a_fresh_classifier_and_trained_features(saved):
    net, whole = Net.from_pretrained(num_classes=3), Net.from_pretrained()
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert torch.equal(net.c3[0][0].conv.weight, whole.c3[0][0].conv.weight)
    with pytest.raises(ValueError, match="num_classes"):
        Net.from_pretrained(num_classes=0)


def test_a_damaged_file_that_ships_is_refused(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cifar10\.pt is not the file that belongs to this model"):
        Net.from_pretrained()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_what_holds_no_weights_is_refused(tmp_path, content):
    (tmp_path / "mine.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"mine\.pt does not hold the weights of a Net"):
        Net.from_pretrained(tmp_path / "mine.pt")


@pytest.mark.parametrize("state", [Net(num_classes=7).state_dict(), {}, [1, 2], torch.zeros(3)])
def test_weights_of_another_network_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match=r"mine\.pt does not hold the weights of a Net"):
        Net.from_pretrained(tmp_path / "mine.pt")


@pytest.mark.parametrize("state", [{1: torch.zeros(3)}, {"fc.weight": None}])
def test_what_torch_fails_on_in_other_ways_is_refused_too(tmp_path, state):
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match=r"mine\.pt does not hold the weights of a Net"):
        Net.from_pretrained(tmp_path / "mine.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = Net().state_dict()
    state["fc.weight"][3, 4] = torch.nan
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match=r"mine\.pt holds weights that are infinite or NaN"):
        Net.from_pretrained(tmp_path / "mine.pt")


def test_an_empty_name_is_not_taken_for_the_weights_that_ship(saved):
    with pytest.raises(WeightsError, match="cannot be read"):
        Net.from_pretrained("")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pt: the weights cannot be read"):
        Net.from_pretrained(tmp_path / "none.pt")


def test_fine_tuning_learns_new_classes_from_trained_features(saved):
    """As in the README: a fresh classifier, trained with the features at a small rate."""
    net = Net.from_pretrained(num_classes=2)
    images = torch.randn(64, 3, 32, 32)
    labels = torch.arange(64) % 2
    images[labels == 1] += 1
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    optimizer = recipe_optimizer(net, lr=0.01)
    losses = [train_one_epoch(net, loader, optimizer)[0] for _ in range(4)]
    assert losses[-1] < 0.5 * losses[0]
    assert evaluate(net, loader)[1] == 100


def test_the_weights_that_ship_are_those_of_this_network_wherever_it_is_imported_from(tmp_path):
    code = (
        "import torch\nfrom model import Net\nnet = Net.from_pretrained()\n"
        "print(net.training, sum(p.numel() for p in net.parameters()), tuple(net(torch.zeros(2, 3, 32, 32)).shape))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "False 2034040 (2, 10)\n", done.stderr


def test_the_weights_that_ship_are_plain_tensors_under_10_mb_and_those_of_the_card():
    assert model.WEIGHTS.stat().st_size < 10e6
    state = torch.load(model.WEIGHTS, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    card = json.loads((REPOSITORY / "weights/card.json").read_text())
    assert card["sha256"] == model.WEIGHTS_SHA256
    run = json.loads((REPOSITORY / "weights/metrics.json").read_text())
    assert abs(card["accuracy"] - run["history"]["test_accuracy"][-1]) < 0.15  # fp32 against the precision of the run
    assert (run["data"], run["config"]["holdout"]) == ("cifar10", 0)
    assert card["mean_confidence"] < card["accuracy"], "weights/README.md says that the probabilities are too modest"
