"""A run's folder: two runs never share one, and odd contents of a checkpoint are refused in a sentence."""

import pickle
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_cifar10_in
from small_runs import plain, plain_network, quick, signal_at, small_network

import train
from machinery import checkpoint, errors
from train import CheckpointError, SettingError, StoppedError, fit, resumed


def test_runs_without_a_name_that_begin_in_one_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "now")
    failed = []

    def search(lr: float) -> None:
        try:
            fit(plain(name=None, lr=lr, epochs=1), plain_network())
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
def finished(tmp_path_factory, tiny) -> bytes:
    with tiny_cifar10_in(tmp_path_factory.mktemp("finished"), tiny):
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
        change("result.history", {"epoch": [1], "lr": []}),
        change("result.history", ...),
        change("result.versions", ...),
        change("result.wall_seconds", ...),
        change("meter", None),
        change("meter.images", ...),
        change("meter.sums", 3),
        change("model", {}),
        change("optimizer", 1),
        change("optimizer.param_groups", []),
        change("result.train_set.digest", ...),
        change("scheduler", "linear"),
        change("sampler.losses", torch.zeros(3)),
        change("sampler", ...),
        change("random.cpu", torch.zeros(3)),
        change("items", ...),
        change("rate", ...),
        change("random", ...),
    ],
)
def test_a_checkpoint_with_odd_contents_is_refused_in_a_sentence(finished, odd, capsys):
    path = Path("runs/quick/last.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(finished)
    path.write_bytes(checkpoint.packed(odd(checkpoint.load(path))))
    with pytest.raises((CheckpointError, SettingError)):
        fit(resumed("runs/quick", epochs=2, data_dir=None), small_network())
    assert train.main(["--resume", "runs/quick"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_error_passes_from_one_process_to_another_with_what_it_holds():
    arguments = {"StoppedError": ("stopped", 15), "UnsavedError": ("full", {"epoch": [1]})}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            error = kind(*arguments.get(kind.__name__, ("message",)))
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_stored_paths_are_absolute_and_the_command_to_go_on_is_quoted(tiny_root, monkeypatch):
    monkeypatch.chdir(tiny_root.parent)
    config = plain(data_dir=tiny_root.name, name="my run", epochs=1)
    assert config.data_dir == str(tiny_root)
    with pytest.raises(StoppedError, match="--resume 'runs/my run'"):
        fit(config, signal_at(plain_network(), 2))
