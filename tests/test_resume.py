"""What is stopped goes on bit for bit, with the settings that it had, and is never overwritten unasked."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from small_runs import few_images, files_of, quick, signal_at, small_network, timeless, weights
from torch import Tensor, nn

import train
from machinery import checkpoint
from machinery.config import parse_args
from machinery.folder import FILES
from model import Net
from train import CheckpointError, SettingError, StoppedError, fit, resumed

pytestmark = pytest.mark.usefixtures("quick_curves")


@pytest.mark.parametrize(  # 4, 3 and 4 steps
    ("step", "workers", "number"), [(1, 0, signal.SIGINT), (4, 1, signal.SIGTERM), (6, 2, signal.SIGINT), (10, 0, 15)]
)
def test_a_stopped_run_goes_on_bit_for_bit(uninterrupted, step, workers, number):
    with pytest.raises(StoppedError, match=r"--resume runs.quick") as stopped:
        fit(quick(workers=workers), signal_at(small_network(), step, number))
    assert stopped.value.signal == number
    model = small_network()
    history = fit(quick(resume="runs/quick"), model)
    assert torch.equal(weights(model), uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])
    saved = json.loads(Path("runs/quick/metrics.json").read_text())
    assert saved["history"] == history
    assert files_of("quick") == sorted(FILES)


def test_a_run_stopped_many_times_goes_on_bit_for_bit(uninterrupted):
    config = quick()
    for _ in range(5):
        with pytest.raises(StoppedError):
            fit(config, signal_at(small_network(), 2))
        config = quick(resume="runs/quick")
    model = small_network()
    fit(config, model)
    assert torch.equal(weights(model), uninterrupted[0])


def test_a_run_knows_the_runs_before_it_and_goes_on_without_their_weights():
    def record(name: str) -> tuple[list, dict]:
        result = json.loads(Path("runs", name, "metrics.json").read_text())
        return result.pop("before"), result

    torch.save(Net().state_dict(), "start.pt")
    Path("metrics.json").write_text("[]")  # of something else
    for name, start in (("a", "start.pt"), ("b", "runs/a/model.pt"), ("quick", "runs/b/model.pt")):
        fit(quick(weights=start, epochs=1, name=name, skip=0, batch_size=16), **few_images())
    (before_a, a), (before_b, b) = record("a"), record("b")
    assert (before_a, before_b) == ([], [a])
    Path("runs/b/model.pt").unlink()
    assert fit(resumed("runs/quick", epochs=2), **few_images())["epoch"] == [1, 2]
    assert record("quick")[0] == [a, b]


def test_a_run_that_skips_keeps_its_length():
    fit(quick(epochs=2), small_network())
    with pytest.raises(SettingError, match=r"epochs: a run with skip keeps its length.* one of 2, got 4"):
        fit(quick(epochs=4, resume="runs/quick"), small_network())


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


def test_the_command_line_goes_on_with_the_settings_of_the_run(monkeypatch, capsys):
    with pytest.raises(StoppedError):
        fit(quick(lr=0.1), signal_at(small_network(), 3))
    config = parse_args(["--resume", "runs/quick", "--workers", "1"])
    assert (config.lr, config.epochs, config.workers, config.resume) == (0.1, 3, 1, "runs/quick")
    monkeypatch.setattr(train, "Net", lambda classes: signal_at(small_network(), 1, signal.SIGTERM))
    assert train.main(["--resume", "runs/quick"]) == 128 + signal.SIGTERM
    assert "python train.py --resume runs" in capsys.readouterr().err
    assert train.main(["--resume", "runs/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read the checkpoint")  # without argparse's usage


def test_other_settings_are_refused_by_name_and_nothing_is_lost(uninterrupted):
    with pytest.raises(StoppedError):
        fit(quick(), signal_at(small_network(), 6))
    before = Path("runs/quick/last.pt").read_bytes()
    with pytest.raises(SettingError, match=r"lr 0.2 \(the run has 0.12\); seed 1 \(the run has 0\)"):
        fit(quick(resume="runs/quick", lr=0.2, seed=1), small_network())
    with pytest.raises(CheckpointError, match="does not fit this network"):
        fit(quick(resume="runs/quick"), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert Path("runs/quick/last.pt").read_bytes() == before


def test_a_checkpoint_of_another_version_is_named_as_such(uninterrupted):
    with pytest.raises(StoppedError):
        fit(quick(), signal_at(small_network(), 6))
    file = Path("runs/quick/last.pt")
    state = checkpoint.load(file)
    del state["result"]["config"]["seed"]
    state["result"]["config"]["momentum"] = 0.9
    file.write_bytes(checkpoint.packed(state))
    message = r"another version of this repository, with other settings \(momentum, seed\)"
    with pytest.raises(CheckpointError, match=message):
        fit(quick(resume="runs/quick"), small_network())
    with pytest.raises(CheckpointError, match=message):
        resumed("runs/quick")


def test_a_run_that_goes_on_keeps_its_folder_and_the_weights_of_its_last_whole_epoch():
    with pytest.raises(StoppedError):
        fit(quick(), signal_at(small_network(), 6))
    after_the_epoch = Path("runs/quick/model.pt").read_bytes()
    with pytest.raises(StoppedError):
        fit(quick(resume="runs/quick"), signal_at(small_network(), 1))
    assert Path("runs/quick/model.pt").read_bytes() == after_the_epoch
    with pytest.raises(SettingError, match="goes on in its own folder, runs/quick; leave out name 'other'"):
        quick(resume="runs/quick", name="other")
    assert resumed("runs/quick", workers=2).name == "quick"


def test_more_epochs_follow_the_longer_schedule_and_fewer_are_refused(capsys):
    fit(quick(epochs=2, skip=0), small_network())
    history = fit(quick(epochs=4, skip=0, resume="runs/quick"), small_network())
    assert "epochs 2 -> 4" in capsys.readouterr().out
    assert history["epoch"] == [1, 2, 3, 4]
    assert history["lr"] == pytest.approx([0.12, 0.06, 0.06, 0.03])
    with pytest.raises(SettingError, match="is one of 4, got 3"):
        fit(quick(epochs=3, skip=0, resume="runs/quick"), small_network())


def test_a_finished_run_is_not_trained_on():
    model = small_network()
    history = fit(quick(epochs=1), model)
    again = small_network()
    assert fit(quick(epochs=1, resume="runs/quick"), again) == history
    assert torch.equal(weights(again), weights(model))


def test_a_run_is_overwritten_only_when_told():
    fit(quick(epochs=1), small_network())
    Path("runs/quick/notes.txt").write_text("mine")
    before = Path("runs/quick/metrics.json").read_bytes()
    with pytest.raises(SettingError, match="holds a run already"):
        fit(quick(epochs=1), small_network())
    assert Path("runs/quick/metrics.json").read_bytes() == before
    fit(quick(epochs=1, overwrite=True), small_network())
    assert Path("runs/quick/notes.txt").read_text() == "mine"
    with pytest.raises(SettingError, match="give one of them"):
        quick(overwrite=True, resume="runs/quick")
