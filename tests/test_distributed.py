"""Two processes train as one does, and come through the death of one of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from dataset import EpochSampler

FLAGS = ["--epochs", "2", "--batch-size", "48", "--workers", "0", "--precision", "fp32"]  # 48 * 4 + 8 images

SMALL_NETWORK = """
from torch import nn
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(*layers)
    model.register_forward_hook(after_forward)
    return model
def after_forward(model, inputs, output):
    pass
train.Net = network
"""

DIES = """
steps = 0
def after_forward(model, inputs, output):
    global steps
    steps += model.training
    if steps == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100)


def history_of(name: str) -> dict[str, list]:
    history = json.loads(Path("runs", name, "metrics.json").read_text())["history"]
    return {column: values for column, values in history.items() if column != "seconds"}


def test_two_processes_learn_what_one_learns_and_survive_the_death_of_one(driver):
    script = driver(SMALL_NETWORK)
    one = subprocess.run([sys.executable, script, *FLAGS, "--name", "one"], capture_output=True, text=True, check=False)
    assert one.returncode == 0, one.stderr
    two = torchrun(script, *FLAGS, "--name", "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("epoch 2/2: train") == 1  # only one of them speaks
    assert "2 processes" in two.stdout
    for column, values in history_of("one").items():
        if column not in ("data", "tested_on"):
            assert history_of("two")[column] == pytest.approx(values, rel=1e-2), column

    died = torchrun("--max-restarts=1", driver(SMALL_NETWORK + DIES), *FLAGS, "--name", "died")
    assert died.returncode == 0, died.stderr
    assert "going on after 1 epochs" in died.stdout
    assert history_of("died") == history_of("two")
    ends = [checkpoint.load(Path("runs", name, "last.pt"))["model"] for name in ("two", "died")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_together_the_processes_meet_every_image_once_and_in_the_same_batches():
    whole = list(EpochSampler(202, seed=1))
    parts = [list(EpochSampler(202, seed=1, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [68, 67, 67]
    for start in range(0, 202, 30):
        batch = [pair for part in parts for pair in part[start // 3 : start // 3 + 10]]
        assert sorted(batch) == sorted(whole[start : start + 30])


def test_what_the_processes_cannot_share_is_refused(driver):
    run = torchrun(driver(), "--epochs", "1", "--batch-size", "25", "--name", "odd")
    assert run.returncode != 0
    assert "batch_size must be a multiple of the 2 processes" in run.stderr
    run = torchrun("--max-restarts=1", driver(), "--epochs", "1")
    assert "--max-restarts, torchrun needs one by which the run is found again" in run.stderr
