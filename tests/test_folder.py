"""A run's folder: two runs never share one, and odd contents are refused in a sentence."""

import pickle
import threading
from pathlib import Path

import pytest
import torch
from small_runs import plain, plain_network, quick, signal_at, small_network

import train
from machinery import checkpoint, errors
from train import CheckpointError, SettingError, StoppedError, UnsavedError, fit, resumed


def test_runs_without_a_name_that_begin_in_one_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "now")
    failed = []

    def search(lr: float) -> None:
        try:
            fit(plain(name=None, lr=lr), plain_network())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=search, args=(lr,)) for lr in (0.01, 0.02, 0.03)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert folders == ["cifar10-seed0-now", "cifar10-seed0-now-2", "cifar10-seed0-now-3"]
    rates = {torch.load(Path("runs", name, "last.pt"), weights_only=True)["result"]["config"]["lr"] for name in folders}
    assert rates == {0.01, 0.02, 0.03}


def test_a_name_that_is_taken_is_refused_within_a_process_too():
    refused = []

    def again(row: dict) -> None:
        with pytest.raises(SettingError, match=r"name: this process is already writing to runs.plain") as error:
            fit(plain(overwrite=True), plain_network())
        refused.append(error)

    fit(plain(), plain_network(), on_epoch=again)
    assert len(refused) == 2


def change(path: str, value: object):
    """A change of the state: what stands at this path, keys separated by dots, becomes `value`, or goes if it is ..."""

    def apply(state: dict) -> object:
        *keys, last = path.split(".")
        place = state
        for key in keys:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        return state

    return apply


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        for name, value in tiny.expectations().items():
            patch.setattr("torchvision.datasets.CIFAR10." + name, value)
        fit(quick(epochs=1, data_dir=tiny.root), small_network())
        return Path("runs/quick/last.pt").read_bytes()


@pytest.mark.parametrize(
    "odd",
    [
        lambda state: [state],
        lambda state: {},
        change("result", []),
        change("result.config", [1]),
        change("result.config.lr", ...),
        change("result.config.colour", "red"),
        change("result.config.lr", "fast"),
        change("result.history", [1, 2]),
        change("result.history", {"epoch": [1], "lr": []}),
        change("result.history", ...),
        change("result.versions", ...),
        change("result.wall_seconds", ...),
        change("meter", None),
        change("meter.images", ...),
        change("meter.colour", 1),
        change("meter.sums", 3),
        change("model", []),
        change("model", {}),
        change("optimizer", 1),
        change("optimizer.param_groups", []),
        change("scheduler", "linear"),
        change("losses", torch.zeros(3)),
        change("losses", ...),
        change("random", [1, 2]),
        change("random", torch.zeros(3)),
        change("random", ...),
    ],
)
def test_a_checkpoint_with_odd_contents_is_refused_in_a_sentence(stopped, odd, capsys):
    path = Path("runs/quick/last.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(stopped)
    path.write_bytes(checkpoint.packed(odd(checkpoint.load(path))))
    with pytest.raises((CheckpointError, SettingError)):
        fit(resumed("runs/quick", epochs=2, data_dir=None), small_network())
    assert train.main(["--resume", "runs/quick"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_error_passes_from_one_process_to_another_with_what_it_holds():
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            arguments = {"StoppedError": ("stopped", 15), "UnsavedError": ("full", {"epoch": [1]})}
            error = kind(*arguments.get(kind.__name__, ("message",)))
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))
    assert pickle.loads(pickle.dumps(StoppedError("stopped", 15))).signal == 15
    assert pickle.loads(pickle.dumps(UnsavedError("full", {"epoch": [1]}))).history == {"epoch": [1]}


def test_stored_paths_are_absolute_and_the_command_to_go_on_is_quoted(tiny_root, monkeypatch):
    monkeypatch.chdir(tiny_root.parent)
    config = plain(data_dir=tiny_root.name, name="my run", epochs=1)
    assert config.data_dir == str(tiny_root)
    with pytest.raises(StoppedError, match="--resume 'runs/my run'"):
        fit(config, signal_at(plain_network(), 2))
