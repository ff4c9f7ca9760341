"""What the machine does to a run is named and survived: full disks, dying processes, kills at any instant."""

import errno
import io
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
from small_runs import few_images, files_of, plain, plain_network, quick, signal_at, small_network, timeless, weights
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from machinery import checkpoint
from machinery.errors import failure_of_the_machine
from train import Config, MachineError, NonFiniteLossError, SettingError, StoppedError, UnsavedError, fit

WRITTEN = ["last.pt", "metrics.json", "model.pt"]  # but for the pictures


def hooked(do, model: nn.Module | None = None) -> nn.Module:
    """A network that calls `do` in every forward pass in training."""
    model = model or small_network()
    model.register_forward_hook(lambda module, inputs, output: do() if module.training else None)
    return model


def test_a_full_disk_costs_neither_the_run_nor_the_last_checkpoint(monkeypatch, capsys):
    good, written = checkpoint.write_whole, []

    def write(path: Path, content: bytes) -> None:
        if len(written) >= 4:  # the files of the first epoch, and one of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        good(path, content)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    model = small_network()
    with pytest.raises(UnsavedError, match="No space left") as error:
        fit(quick(), model)
    assert error.value.history["epoch"] == [1, 2, 3]
    assert "training goes on" in capsys.readouterr().err
    assert checkpoint.load(Path("runs/quick/last.pt"))["result"]["history"]["epoch"] == [1, 2]
    old = torch.load("runs/quick/model.pt", weights_only=True)["model"]["0.weight"]
    monkeypatch.setattr(checkpoint, "write_whole", good)
    stopped = signal_at(small_network(), 1)
    with pytest.raises(StoppedError):  # what could not be written is written first
        fit(quick(resume="runs/quick"), stopped)
    assert not torch.equal(torch.load("runs/quick/model.pt", weights_only=True)["model"]["0.weight"], old)
    fit(quick(resume="runs/quick"), resumed := small_network())
    assert torch.equal(weights(resumed), weights(model))


def test_two_processes_do_not_write_to_one_folder_nor_does_one_twice():
    refused = []

    def again(row: dict) -> None:
        with pytest.raises(SettingError, match="writing to runs") as error:
            fit(quick(overwrite=True), small_network())
        refused.append(error)

    fit(quick(epochs=1), small_network(), on_epoch=again)
    assert len(refused) == 1
    hold = "import filelock; lock = filelock.FileLock('runs/quick/.lock'); lock.acquire()"
    hold += "; print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    for config in (quick(epochs=1, resume="runs/quick"), quick(overwrite=True)):
        with pytest.raises(SettingError, match="another process is writing to runs"):
            fit(config, small_network())
    assert files_of("quick") == WRITTEN
    other.kill()
    other.wait()
    with pytest.raises(StoppedError) as stopped:
        fit(quick(overwrite=True), signal_at(small_network(), 2))
    take = "import filelock; filelock.FileLock('runs/quick/.lock').acquire(blocking=False)"
    assert stopped  # as a notebook does, we still hold the exception, and with it everything that the run knew
    subprocess.run([sys.executable, "-c", take], check=True)


def test_a_signal_to_all_processes_saves_too():
    steps = []

    def signal_all() -> None:
        steps.append(1)
        if len(steps) == 3:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid or 0, signal.SIGTERM)

    with pytest.raises(StoppedError, match="saved after 0 epochs and 3 steps"):
        fit(plain(batch_size=50, augment=("trivial",), workers=1), hooked(signal_all))
    assert checkpoint.load(Path("runs/plain/last.pt"))["meter"]["images"] == 150


def test_a_worker_that_dies_is_named_and_the_run_goes_on():
    steps, settings = [], {"augment": ("trivial",), "batch_size": 20}

    def kill_worker() -> None:
        steps.append(1)
        if len(steps) == 14:  # the last batch of the epoch is not yet asked for
            for process in multiprocessing.active_children():
                process.kill()

    fit(plain(name="whole", workers=0, **settings), whole := small_network())
    with pytest.raises(MachineError, match=r"(?s)images died.*--resume runs/plain"):
        fit(plain(workers=1, **settings), hooked(kill_worker))
    fit(plain(resume="runs/plain", **settings), resumed := small_network())
    assert torch.equal(weights(resumed), weights(whole))


def test_a_folder_deleted_under_the_run_comes_back():
    history = fit(quick(), hooked(lambda: shutil.rmtree("runs", ignore_errors=True)))
    assert checkpoint.load(Path("runs/quick/last.pt"))["result"]["history"] == history


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_closed_standard_error_ends_no_run(monkeypatch, stream):
    if stream:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert fit(plain(epochs=1, batch_size=8), plain_network(), **few_images())["epoch"] == [1]


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence():
    with pytest.raises(SettingError, match=r"^name: cannot write to"):
        fit(plain(name="a" * 300), plain_network())
    shutil.rmtree("runs", ignore_errors=True)
    Path("runs").symlink_to("nowhere")
    for name in (None, "plain"):
        with pytest.raises(SettingError, match=r"^name: cannot write to"):
            fit(plain(name=name), plain_network())


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_named(error):
    def run_out() -> None:
        raise error

    with pytest.raises(MachineError, match=r"(?s)memory ran out.*nothing was saved yet"):
        fit(quick(), hooked(run_out))


def test_broken_weights_do_not_replace_good_ones_and_what_was_half_written_is_removed():
    fit(quick(skip=0, epochs=2), small_network())
    Path("runs/quick/.last.pt.new").write_bytes(b"half")
    model = small_network()
    model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(NonFiniteLossError):
        fit(quick(skip=0, epochs=4, resume="runs/quick", save_minutes=0), model)
    state = checkpoint.load(Path("runs/quick/last.pt"))
    assert all(value.isfinite().all() for value in state["model"].values() if isinstance(value, Tensor))
    assert files_of("quick") == WRITTEN


# Imports once, then forks for every line of arguments; prints the number of the process, and with what it ended.
FORKED = """
for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os._exit(train.main(line.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.exit()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has none")
def test_killed_at_any_instant_it_goes_on_bit_for_bit(tiny, driver, monkeypatch):
    """As benchmarks/fault_injection.py does it 50 times: SIGKILL at random, with a save after every step."""
    flags = f"--epochs 2 --batch-size 40 --workers 1 --precision fp32 --save-minutes 0 --data-dir {tiny.root}".split()

    here = f"sys.path.insert(0, {str(Path(__file__).parent)!r})"
    network = "from small_runs import small_network\ntrain.Net = lambda classes: small_network()"
    quiet = "train._draw = lambda *arguments: None"
    script = [sys.executable, driver(f"{here}\n{network}\n{quiet}\n{FORKED}")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    monkeypatch.setattr("train.Net", lambda classes: small_network())
    fit(Config(name="whole", epochs=2, batch_size=40, precision="fp32"))
    dice, arguments, last = random.Random(0), [*flags, "--name", "killed"], Path("runs/killed/last.pt")
    with subprocess.Popen(script, **pipes) as forking:

        def start(*arguments: str) -> int:
            print(*arguments, file=forking.stdin, flush=True)
            return int(forking.stdout.readline())

        for _ in range(3):
            process = start(*arguments)
            for _ in range(dice.randint(1, 2)):
                before = last.stat().st_mtime_ns if last.exists() else 0
                while not last.exists() or last.stat().st_mtime_ns == before:
                    os.kill(process, 0)  # it lives
                    time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
            assert int(forking.stdout.readline()) == -signal.SIGKILL
            arguments = ["--resume", "runs/killed"]
        start(*arguments)
        assert forking.stdout.readline() == "0\n"
    ends = [checkpoint.load(Path("runs", name, "last.pt")) for name in ("whole", "killed")]
    assert all(torch.equal(ends[0]["model"][key], ends[1]["model"][key]) for key in ends[0]["model"])
    assert timeless(ends[0]["result"]["history"]) == timeless(ends[1]["result"]["history"])
    assert files_of("killed") == WRITTEN


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "Too many open files. Communication with the workers is no longer possible.",
        "DataLoader worker (pid 7) is killed by signal: Killed.",
    ],
)
def test_workers_that_lack_room_are_named_with_the_way_out(text):
    assert "workers = 0" in failure_of_the_machine(RuntimeError(text))
    assert failure_of_the_machine(RuntimeError("another fault")) is None


def train_in_a_pool(name: str) -> list[float]:
    images = TensorDataset(torch.linspace(-1, 1, 8 * 3072).view(8, 3, 32, 32), torch.arange(8))  # which need workers
    config = plain(name=name, workers=1, epochs=1, batch_size=4)
    return fit(config, plain_network(), train_set=images, test_set=images)["train_loss"]


def test_a_process_that_may_have_no_children_trains_without_workers():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        in_pool = pool.apply_async(train_in_a_pool, ("pool",)).get(timeout=60)
    assert in_pool == train_in_a_pool("same")
