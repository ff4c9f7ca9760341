"""What the machine does to a run is named and survived: full disks, dying processes, kills at any instant."""

import errno
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
from small_runs import files_of, plain, plain_network, quick, signal_at, small_network, timeless, weights
from torch import Tensor, nn

from machinery import checkpoint, distributed
from machinery.folder import FILES
from train import Config, MachineError, NonFiniteLossError, SettingError, StoppedError, UnsavedError, fit

pytestmark = pytest.mark.usefixtures("quick_curves")


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
        "class Signalling(torch.nn.Sequential):\n"
        "    def __init__(self, classes=10):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3072, classes))\n"
        "        self.register_forward_hook(signal_all)\n"
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

    fit(quick(skip=0, epochs=2), model)
    model = small_network()
    model.register_forward_hook(poison)
    with pytest.raises(NonFiniteLossError):
        fit(quick(skip=0, epochs=4, resume="runs/quick", save_minutes=0), model)
    state = checkpoint.load(Path("runs/quick/last.pt"))
    assert all(value.isfinite().all() for value in state["model"].values())


def test_what_a_killed_process_left_half_written_is_cleaned_up():
    fit(quick(skip=0, epochs=1), small_network())
    Path("runs/quick/.last.pt.new").write_bytes(b"half")
    fit(quick(skip=0, epochs=2, resume="runs/quick"), small_network())
    assert files_of("quick") == sorted(FILES)


# Imports once, then forks for every line of arguments; says the number of the process, and with what it ended.
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
    """As benchmarks/survival.py does it 50 times: SIGKILL at random, with a save after every step."""
    flags = f"--epochs 2 --batch-size 40 --workers 1 --precision fp32 --save-minutes 0 --data-dir {tiny.root}".split()

    here = f"sys.path.insert(0, {str(Path(__file__).parent)!r})"
    network = "from small_runs import small_network\ntrain.Net = lambda classes: small_network()"
    script = [sys.executable, driver(f"{here}\n{network}\n{FORKED}")]
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
            time.sleep(dice.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
            assert int(forking.stdout.readline()) == -signal.SIGKILL
            arguments = ["--resume", "runs/killed"]
        start(*arguments)
        assert forking.stdout.readline() == "0\n"
    ends = [checkpoint.load(Path("runs", name, "last.pt")) for name in ("whole", "killed")]
    assert all(torch.equal(ends[0]["model"][key], ends[1]["model"][key]) for key in ends[0]["model"])
    assert timeless(ends[0]["result"]["history"]) == timeless(ends[1]["result"]["history"])
    assert files_of("killed") == sorted(FILES)


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "Too many open files. Communication with the workers is no longer possible.",
        "[Errno 12] Cannot allocate memory",
        "DataLoader worker (pid 7) is killed by signal: Killed.",
    ],
)
def test_workers_that_lack_room_are_named_with_the_way_out(text):
    assert "workers = 0" in distributed.failure_of_the_machine(RuntimeError(text))
    assert distributed.failure_of_the_machine(RuntimeError("another fault")) is None


def train_in_a_pool(root: Path) -> list[float]:
    return fit(plain(workers=1, epochs=1, data_dir=root), plain_network())["train_loss"]


def test_a_process_that_may_have_no_children_trains_without_workers(tiny_root):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        in_pool = pool.apply(train_in_a_pool, (tiny_root,))
    assert in_pool == fit(plain(name="same", epochs=1), plain_network())["train_loss"]
