"""No run is lost: what is interrupted goes on bit for bit, and what the machine does to it is named and survived."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import checkpoint
import train
from checkpoint import CheckpointError
from config import Config, SettingError, parse_args
from errors import MachineError, NonFiniteLossError, StoppedError, UnsavedError
from runs import FILES
from train import fit


def quick(**settings) -> Config:
    base = {"epochs": 3, "batch_size": 64, "workers": 0, "precision": "fp32", "name": "quick", "save_minutes": 60}
    return Config(**{**base, **settings})


def small_network() -> nn.Module:
    """With BatchNorm, whose statistics, and dropout, whose random state have to survive, too."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 10))


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Drawing the curves would take most of the time here."""
    monkeypatch.setattr("runs.plot_curves", lambda history: Figure())


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def files_of(name: str) -> list[str]:
    return sorted(file for file in os.listdir(Path("runs", name)) if file != checkpoint.LOCK)


def timeless(history: dict) -> dict:
    return {column: values for column, values in history.items() if column != "seconds"}


def signal_at(model: nn.Module, step: int, number: int = signal.SIGINT) -> nn.Module:
    """Sends this process a signal in the middle of the given step of training, counted from 1."""
    count = 0

    def send(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal count
        count += module.training
        if module.training and count == step:
            os.kill(os.getpid(), number)

    model.register_forward_hook(send)
    return model


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny) -> tuple[Tensor, dict]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("uninterrupted"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in tiny.expectations().items():
                patch.setattr("torchvision.datasets.CIFAR10." + name, value)
            model = small_network()
            history = fit(quick(data_dir=tiny.root), model)
    finally:
        os.chdir(before)
    return weights(model), history


@pytest.mark.parametrize(  # 4 steps an epoch
    ("step", "workers", "number"), [(1, 0, signal.SIGINT), (4, 1, signal.SIGTERM), (6, 2, signal.SIGINT), (11, 0, 15)]
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
    resumed = parse_args(["--resume", "runs/quick", "--workers", "1"])
    assert (resumed.lr, resumed.epochs, resumed.workers, resumed.resume) == (0.1, 3, 1, "runs/quick")
    monkeypatch.setattr(train, "Net", lambda: signal_at(small_network(), 1, signal.SIGTERM))
    assert train.main(["--resume", "runs/quick"]) == 128 + signal.SIGTERM
    assert "python train.py --resume runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--resume", "runs/nowhere"])
    assert "cannot read the checkpoint" in capsys.readouterr().err


def test_other_settings_are_refused_by_name_and_nothing_is_lost(uninterrupted):
    with pytest.raises(StoppedError):
        fit(quick(), signal_at(small_network(), 6))
    before = Path("runs/quick/last.pt").read_bytes()
    with pytest.raises(SettingError, match=r"lr 0.2 \(the run has 0.12\); seed 1 \(the run has 0\)"):
        fit(quick(resume="runs/quick", lr=0.2, seed=1), small_network())
    with pytest.raises(CheckpointError, match="does not fit this network"):
        fit(quick(resume="runs/quick"), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert Path("runs/quick/last.pt").read_bytes() == before


def test_more_epochs_follow_the_longer_schedule_and_fewer_are_refused(capsys):
    fit(quick(epochs=2), small_network())
    history = fit(quick(epochs=4, resume="runs/quick"), small_network())
    assert "epochs 2 -> 4" in capsys.readouterr().out
    assert history["epoch"] == [1, 2, 3, 4]
    assert history["lr"] == pytest.approx([0.12, 0.06, 0.06, 0.03])
    with pytest.raises(SettingError, match="is one of 4, got 3"):
        fit(quick(epochs=3, resume="runs/quick"), small_network())


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


def test_a_full_disk_costs_neither_the_run_nor_the_last_checkpoint(monkeypatch, capsys):
    good, full = checkpoint.write_whole, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = []

    def write(path: Path, content: bytes) -> None:
        if len(written) >= 4:  # the files of the first epoch
            raise full
        written.append(path.name)
        good(path, content)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    model = small_network()
    with pytest.raises(UnsavedError, match="No space left") as error:
        fit(quick(), model)
    assert error.value.history["epoch"] == [1, 2, 3]
    assert "training goes on" in capsys.readouterr().err
    assert checkpoint.load(Path("runs/quick/last.pt"))["result"]["history"]["epoch"] == [1]
    monkeypatch.setattr(checkpoint, "write_whole", good)
    resumed = small_network()
    fit(quick(resume="runs/quick"), resumed)
    assert torch.equal(weights(resumed), weights(model))


def test_results_that_could_not_be_written_are_written_when_resumed(monkeypatch):
    good = checkpoint.write_whole

    def write(path: Path, content: bytes) -> None:
        if path.name == "model.pt":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        good(path, content)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    model = small_network()
    with pytest.raises(UnsavedError):
        fit(quick(epochs=1), model)
    monkeypatch.setattr(checkpoint, "write_whole", good)
    fit(quick(epochs=1, resume="runs/quick"), small_network())
    saved = torch.load("runs/quick/model.pt", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(not checkpoint.fcntl, reason="Windows has no such lock")
def test_two_processes_do_not_write_to_one_folder():
    fit(quick(epochs=1), small_network())
    hold = "import fcntl; file = open('runs/quick/.lock', 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    hold += "; print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    for config in (quick(epochs=1, resume="runs/quick"), quick(overwrite=True)):
        with pytest.raises(SettingError, match="another process is writing to runs"):
            fit(config, small_network())
    assert files_of("quick") == sorted(FILES)
    other.kill()
    other.wait()
    with pytest.raises(StoppedError) as stopped:
        fit(quick(overwrite=True), signal_at(small_network(), 2))
    take = "import fcntl; fcntl.lockf(open('runs/quick/.lock', 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert stopped  # as a notebook does, we still hold the exception, and with it everything that the run knew
    subprocess.run([sys.executable, "-c", take], check=True)


def test_a_signal_to_all_processes_saves_too(driver):
    patch = (
        "def signal_all(module, inputs, output, count=[0]):\n"
        "    count[0] += module.training\n"
        "    if count[0] == 3:\n        os.killpg(0, signal.SIGTERM)\n"
        "class Signalling(train.Net):\n"
        "    def __init__(self):\n        super().__init__()\n        self.register_forward_hook(signal_all)\n"
        "train.Net = Signalling"
    )
    command = [sys.executable, driver(patch), "--name", "all", "--batch-size", "50", "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr
    assert "saved after 0 epochs and 3 steps" in run.stderr
    assert checkpoint.load(Path("runs/all/last.pt"))["meter"]["images"] == 150


def test_a_folder_deleted_under_the_run_comes_back():
    def delete(module: nn.Module, inputs: object, output: object) -> None:
        shutil.rmtree("runs", ignore_errors=True)

    model = small_network()
    model.register_forward_hook(delete)
    history = fit(quick(), model)
    assert checkpoint.load(Path("runs/quick/last.pt"))["result"]["history"] == history


def test_a_worker_that_dies_is_named_and_the_run_goes_on(uninterrupted):
    model, steps = small_network(), 0

    def kill_worker(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal steps
        steps += module.training
        if steps == 5:  # the last batch of the epoch is not yet asked for
            for process in multiprocessing.active_children():
                process.kill()

    model.register_forward_hook(kill_worker)
    with pytest.raises(MachineError, match=r"(?s)images died.*--resume runs/quick"):
        fit(quick(workers=1, epochs=3), model)
    resumed = small_network()
    fit(quick(resume="runs/quick"), resumed)
    assert torch.equal(weights(resumed), uninterrupted[0])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_named(error):
    def run_out(module: nn.Module, inputs: object) -> None:
        raise error

    model = small_network()
    model.register_forward_pre_hook(run_out)
    with pytest.raises(MachineError, match=r"(?s)memory ran out.*nothing was saved yet"):
        fit(quick(), model)


def test_broken_weights_do_not_replace_good_ones():
    model = small_network()

    def poison(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * float("nan")

    fit(quick(epochs=2), model)
    model = small_network()
    model.register_forward_hook(poison)
    with pytest.raises(NonFiniteLossError):
        fit(quick(epochs=4, resume="runs/quick", save_minutes=0), model)
    state = checkpoint.load(Path("runs/quick/last.pt"))
    assert all(value.isfinite().all() for value in state["model"].values())


def test_what_a_killed_process_left_half_written_is_cleaned_up():
    fit(quick(epochs=1), small_network())
    Path("runs/quick/.last.pt.new").write_bytes(b"half")
    fit(quick(epochs=2, resume="runs/quick"), small_network())
    assert files_of("quick") == sorted(FILES)


def test_killed_at_any_instant_it_goes_on_bit_for_bit(tiny, driver):
    """As benchmarks/survival.py does it 50 times: SIGKILL at random, with a save after every step."""
    flags = f"--epochs 2 --batch-size 40 --workers 1 --precision fp32 --save-minutes 0 --data-dir {tiny.root}".split()

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, driver(), *arguments], stdout=subprocess.DEVNULL)

    fit(Config(name="whole", epochs=2, batch_size=40, precision="fp32"))
    dice, arguments, last = random.Random(0), [*flags, "--name", "killed"], Path("runs/killed/last.pt")
    for _ in range(3):
        process = start(*arguments)
        for _ in range(dice.randint(1, 2)):
            before = last.stat().st_mtime_ns if last.exists() else 0
            while not last.exists() or last.stat().st_mtime_ns == before:
                assert process.poll() is None
                time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        arguments = ["--resume", "runs/killed"]
    assert start(*arguments).wait() == 0
    ends = [checkpoint.load(Path("runs", name, "last.pt")) for name in ("whole", "killed")]
    assert all(torch.equal(ends[0]["model"][key], ends[1]["model"][key]) for key in ends[0]["model"])
    assert timeless(ends[0]["result"]["history"]) == timeless(ends[1]["result"]["history"])
    assert files_of("killed") == sorted(FILES)
