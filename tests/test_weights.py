"""Trained weights are found, checked and loaded, or refused by name."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import few_images, plain
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import hubconf
import model
from machinery.weights import read_weights
from model import Net, WeightsError
from train import evaluate, fit, recipe_optimizer, train_one_epoch

REPOSITORY = Path(__file__).parents[1]
NAMES = ["a", "b", "c"]


def save(state: object, file: Path) -> Path:
    torch.save(state, file)
    return file


def same(net: Net, other: Net) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Evil:
    """What a pickle may do."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("it-was-executed"),)


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


@pytest.mark.parametrize(
    ("name", "shape"),
    [("more", 1), ("fc.weight", ()), ("fc.weight", 10), ("fc.weight", (0, 186)), ("fc.weight", (9, 5))],
)
def test_weights_that_fit_but_for_one_are_refused_with_its_name(tmp_path, name, shape):
    torch.save({**Net().state_dict(), name: torch.zeros(shape)}, tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match=rf"mine\.pt does not hold the weights of a Net: 1 entries .* {name}"):
        Net.from_pretrained(tmp_path / "mine.pt")


@pytest.mark.parametrize("state", [nn.Linear(2, 3).state_dict(), {}, [1, 2], torch.zeros(3)])
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


WRAPS: list[Callable] = [nn.DataParallel, torch.compile, AveragedModel, lambda n: torch.compile(nn.DataParallel(n))]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("key", [None, "model", "state_dict", "net", "model_state_dict"])
def test_weights_of_a_wrapped_network_are_found_in_a_checkpoint(tmp_path, wrap, key):
    net = Net(num_classes=3)
    state = wrap(net).state_dict()
    file = save({"epoch": 3, "args": {"lr": 0.1}, key: state} if key else state, tmp_path / "mine.pt")
    assert same(Net.from_pretrained(file), net)


@pytest.mark.usefixtures("quick_curves")
def test_a_run_is_named_by_its_folder_or_by_its_files():
    net = Net()
    fit(plain(epochs=1, batch_size=16, name="mine"), net, **few_images())
    run = Path("runs/mine")
    for place in (run, str(run), run / "last.pt", run / "model.pt"):
        assert same(Net.from_pretrained(place), net)
    (run / "model.pt").unlink()
    assert same(Net.from_pretrained(run), net)
    last = run / "last.pt"
    content = last.read_bytes()
    for damaged in (content[:-1], content + b"?", content[:-1] + bytes([content[-1] ^ 1])):
        last.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"last\.pt .* damaged"):
            Net.from_pretrained(run)
    last.unlink()
    with pytest.raises(WeightsError, match=r"mine.*cannot be read .*no model\.pt or last\.pt"):
        Net.from_pretrained(run)


def test_the_number_of_classes_is_the_file_s_unless_another_is_given(tmp_path):
    torch.manual_seed(1)
    net = Net(num_classes=3)
    file = save(net.state_dict(), tmp_path / "mine.pt")
    assert same(Net.from_pretrained(file), net)
    assert same(Net.from_pretrained(file, num_classes=3), net)
    other = Net.from_pretrained(file, num_classes=10)
    assert other.fc.weight.shape == (10, 186)
    assert torch.equal(other.c3[0][0].conv.weight, net.c3[0][0].conv.weight)


@pytest.mark.parametrize("where", ["within", "beside", "in last.pt"])
def test_names_of_classes_come_with_the_weights(tmp_path, where):
    state, digest = Net(num_classes=3).state_dict(), b""
    saved = {"within": {"model": state, "classes": NAMES}, "in last.pt": {"model": state, "result": {"classes": NAMES}}}
    file = save(saved.get(where, state), tmp_path / "last.pt")
    if where == "in last.pt":
        digest = hashlib.sha256(file.read_bytes()).digest()
    elif where == "beside":
        (tmp_path / "metrics.json").write_text(json.dumps({"classes": NAMES, "history": {}}))
    file.write_bytes(file.read_bytes() + digest)
    assert Net.from_pretrained(file).classes == ("a", "b", "c")
    assert Net.from_pretrained(file, num_classes=2).classes is None


@pytest.mark.parametrize(
    "record", ['{"classes": ["a", "b"]}', '{"classes": null}', '{"classes": [1, 2, 3]}', "[]", "{", ""]
)
def test_what_names_other_classes_or_none_does_no_harm(tmp_path, record):
    (tmp_path / "metrics.json").write_text(record)
    assert Net.from_pretrained(save(Net(num_classes=3).state_dict(), tmp_path / "mine.pt")).classes is None


@pytest.mark.parametrize("content", [Net(), {"model": Net()}, {"model": Net().state_dict(), "note": Evil()}])
def test_a_whole_model_is_refused_in_one_sentence_and_not_executed(tmp_path, content):
    with pytest.raises(WeightsError) as error:
        Net.from_pretrained(save(content, tmp_path / "mine.pt"))
    assert not Path("it-was-executed").exists()
    text = str(error.value)
    assert "mine.pt holds a whole model" in text
    assert "torch.save(model.state_dict(), file)" in text
    assert text.isprintable()
    assert len(text) - len(str(tmp_path)) < 200
    assert error.value.__suppress_context__, "torch's own text advises to run the file"


def test_what_torch_saves_otherwise_is_refused(tmp_path, recwarn):
    torch.save(Net().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(Net()), tmp_path / "script.pt")
    recwarn.clear()
    for name in ("old.pt", "script.pt"):
        with pytest.raises(WeightsError, match=rf"{name} does not hold the weights of a Net: .* not a file of torch"):
            Net.from_pretrained(tmp_path / name)
    assert not recwarn.list


def test_weights_with_a_flipped_bit_are_not_believed(tmp_path):
    dice, file = random.Random(0), save(Net().state_dict(), tmp_path / "mine.pt")
    good = file.read_bytes()
    for _ in range(100):
        bad = bytearray(good)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(WeightsError, match=r"mine\.pt .* damaged"):
            Net.from_pretrained(file)


def test_a_flipped_bit_anywhere_in_a_file_changes_no_weight(tmp_path):
    """Also where there is no checksum: in the table of contents, and in the gaps between the parts.

    Of a part that the table marks as a folder, by such a bit, torch reads nothing, and gives what was in memory.
    """
    state = {"weight": torch.randn(3, 4), "steps": torch.tensor(7)}
    file = save(state, tmp_path / "mine.pt")
    good, refused = file.read_bytes(), 0
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        try:
            found = read_weights(file)["model"]
        except WeightsError:
            refused += 1
        else:
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state), place
    assert refused > len(good) / 4


def test_hub_gives_the_network_from_any_folder(tmp_path):
    code = (
        f"import torch\nfolder = {str(REPOSITORY)!r}\n"
        "fresh, trained = (torch.hub.load(folder, 'net', source='local', pretrained=p) for p in (False, True))\n"
        "few = torch.hub.load(folder, 'net', source='local', pretrained=True, num_classes=3)\n"
        "print(fresh.training, trained.training, few.fc.out_features, sum(p.numel() for p in trained.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True False 3 2034040\n", done.stderr
    assert same(hubconf.net(pretrained=True), Net.from_pretrained())


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
    runs = [*run["before"], run]
    assert all((other["data"], other["config"].get("holdout", 0)) == ("cifar10", 0) for other in runs)
    best = max(other["history"]["test_accuracy"][-1] for other in runs)
    if len(run["mean_of"]) > 1:
        assert card["accuracy"] > best, "the card says so of the mean"
    else:
        assert abs(card["accuracy"] - run["history"]["test_accuracy"][-1]) < 0.15  # fp32 against the run's precision
    assert 0 < card["mean_confidence"] - card["accuracy"] < 2, "weights/README.md says: a little too sure"
    assert card["expected_calibration_error"] <= 2
