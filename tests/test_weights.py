"""Trained weights are found, checked and loaded with what they were trained on, or refused by name."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import model
from machinery import checkpoint
from machinery.weights import read_weights
from model import Net, WeightsError

REPOSITORY = Path(__file__).parents[1]
KNOWN = {"classes": ("a", "b", "c"), "size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
NOTHING = dict.fromkeys(KNOWN)


def save(state: object, file: Path) -> Path:
    torch.save(state, file)
    return file


def same(net: nn.Module, other: nn.Module) -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Evil:
    """What a pickle may do."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("it-was-executed"),)


@pytest.fixture
def pretrained(tmp_path, monkeypatch) -> Path:
    """Weights in half precision where the pretrained ones are looked for."""
    torch.manual_seed(1)
    file = save({**KNOWN, "classes": tuple("abcdefghij"), "model": Net().half().state_dict()}, tmp_path / "cifar10.pt")
    monkeypatch.setattr(model, "WEIGHTS", file)
    monkeypatch.setattr(model, "WEIGHTS_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_pretrained_weights_come_in_eval_mode_and_full_precision_or_not_at_all(pretrained):
    state = torch.get_rng_state()
    net, expected = Net.from_pretrained(), torch.load(pretrained, weights_only=True)["model"]
    assert torch.equal(state, torch.get_rng_state())
    assert not net.training
    assert net.trained_on == {**KNOWN, "classes": tuple("abcdefghij")}
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
        assert value.dtype in (torch.float32, torch.int64)
    other = Net.from_pretrained(num_classes=3)
    assert other.fc.out_features == 3
    assert torch.equal(other.c3[0][0].conv.weight, net.c3[0][0].conv.weight)
    assert other.trained_on == {**KNOWN, "classes": None}
    with pytest.raises(ValueError, match="num_classes"):
        Net.from_pretrained(num_classes=0)
    content = bytearray(pretrained.read_bytes())
    content[len(content) // 2] ^= 1
    pretrained.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cifar10\.pt is missing or not that of this model"):
        Net.from_pretrained()
    pretrained.unlink()
    with pytest.raises(WeightsError, match=r"cifar10\.pt is missing or not that of this model"):
        Net.from_pretrained()
    with pytest.raises(WeightsError, match="cannot be read"):
        Net.from_pretrained("")


def test_what_is_no_file_of_weights_is_refused_with_its_name(tmp_path, recwarn):
    """Without the code that a pickle may hold, and without the advice of torch's own text to run it."""
    net, file = Net(), tmp_path / "mine.pt"
    torch.jit.save(torch.jit.script(net), tmp_path / "script.pt")
    recwarn.clear()
    for content in (net, {"model": net}, {"model": net.state_dict(), "note": Evil()}):
        save(content, file)
        with pytest.raises(WeightsError, match=r"mine\.pt holds a whole model.*state_dict\(\), file\)") as error:
            Net.from_pretrained(file)
        assert str(error.value).isprintable()
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02cos\nsystem\n(S'true'\ntR."):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"mine\.pt is damaged, or not a file of torch"):
            Net.from_pretrained(file)
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("script.pt", "old.pt"):
        with pytest.raises(WeightsError, match=rf"{name} is damaged, or not a file of torch"):
            Net.from_pretrained(tmp_path / name)
    with pytest.raises(WeightsError, match=r"none\.pt cannot be read"):
        Net.from_pretrained(tmp_path / "none.pt")
    assert not Path("it-was-executed").exists()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (nn.Linear(2, 3).state_dict(), "does not hold the weights of a Net: .*Missing"),
        ([1, 2], "holds a list"),
        ({1: torch.zeros(3)}, "does not hold the weights"),
        ({"fc.weight": None}, "does not hold the weights"),
        *(
            ({**Net().state_dict(), name: torch.zeros(shape)}, f"does not hold the weights of a Net: .*{name}")
            for name, shape in (("more", 1), ("fc.weight", ()), ("fc.weight", (0, 186)), ("fc.weight", (9, 5)))
        ),
        (
            {**Net().state_dict(), "fc.weight": torch.full((10, 186), torch.nan)},
            "holds weights that are infinite or NaN",
        ),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, state, said):
    with pytest.raises(WeightsError, match=rf"mine\.pt {said}"):
        Net.from_pretrained(save(state, tmp_path / "mine.pt"))


def test_a_wrapped_network_is_known_by_what_it_wraps(tmp_path):
    """Its weights in any checkpoint, and what it was trained on in its model.pt."""
    net, file = Net(num_classes=3), tmp_path / "mine.pt"
    net.trained_on = KNOWN
    wraps = [nn.DataParallel, torch.compile, AveragedModel, lambda network: torch.compile(nn.DataParallel(network))]
    for wrap, key in zip(wraps, (None, "state_dict", "net", "model_state_dict"), strict=True):
        wrapped = wrap(net)
        assert checkpoint.trained_on(wrapped) == KNOWN
        state = wrapped.state_dict()
        assert same(Net.from_pretrained(save({"epoch": 3, key: state} if key else state, file)), net)
        file.write_bytes(checkpoint.weights_file(wrapped))
        assert torch.load(file, weights_only=True).keys() == {"model", *KNOWN}
        again = Net.from_pretrained(file)
        assert same(again, net)
        assert again.trained_on == KNOWN


def test_a_network_of_one_s_own_has_a_plain_attribute_and_may_have_mean_as_a_buffer(tmp_path):
    net = nn.Linear(2, 3)
    assert checkpoint.trained_on(net) == {}
    net.register_buffer("mean", torch.zeros(2))
    for known in ({}, KNOWN):
        net.trained_on = known
        (tmp_path / "mine.pt").write_bytes(checkpoint.weights_file(net))
        saved = read_weights(tmp_path / "mine.pt")
        assert saved.pop("model").keys() == net.state_dict().keys()
        assert saved == (known or NOTHING)


def test_what_a_file_says_counts_if_it_is_of_the_right_kind(tmp_path):
    state, odd = Net(3).state_dict(), {"classes": 3, "size": -1, "mean": "abc", "std": torch.zeros(3)}
    for saved, expected in [
        ({"model": state, **KNOWN}, KNOWN),
        ({"model": state, **odd}, NOTHING),
        ({"model": state, "classes": ["a", "b"], "size": 48}, {**NOTHING, "size": 48}),
        (state, NOTHING),
    ]:
        assert Net.from_pretrained(save(saved, tmp_path / "last.pt")).trained_on == expected


def test_a_run_is_named_by_its_folder():
    run, first, second = Path("runs/mine"), Net(3), Net(2)
    run.mkdir(parents=True)
    save({"model": first.state_dict()}, run / "last.pt")
    assert same(Net.from_pretrained(str(run)), first)
    save({"model": second.state_dict()}, run / "model.pt")
    assert same(Net.from_pretrained(run), second)
    with pytest.raises(WeightsError, match=r"runs.*model\.pt cannot be read"):
        Net.from_pretrained("runs")


def test_the_pretrained_weights_are_those_of_the_card():
    assert model.WEIGHTS.stat().st_size < 10e6
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
