"""Two processes train as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from dataset import make_loaders
from machinery import checkpoint, distributed
from machinery.data.sampler import EpochSampler
from machinery.folder import after_restart
from train import Config, SettingError

# Of 200 images 149 are trained on: three batches of 48, one of 5. Neither 5 nor 51 can be halved.
# Skipping half of them leaves 75: one batch of 48, one of 27.
FLAGS = ["--epochs", "3", "--batch-size", "48", "--holdout", "51", "--workers", "0", "--precision", "fp32"]
FLAGS += ["--skip", "0.5"]

# Without a bias before BatchNorm: its gradient is rounding alone, and Adam would make steps of it.
SMALL_NETWORK = """
from torch import nn
def network(classes=10):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(*layers)
train.Net = network
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100)


def history_of(name: str) -> dict[str, list]:
    history = json.loads(Path("runs", name, "metrics.json").read_text())["history"]
    return {column: values for column, values in history.items() if column != "seconds"}


KILLED_ONCE = """
from machinery import run as runs
finish_epoch = runs.Run.finish_epoch
def finish_and_die(self, *results):
    finish_epoch(self, *results)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
runs.Run.finish_epoch = finish_and_die
"""


def test_two_processes_learn_what_one_learns_though_one_is_killed_and_started_anew(driver, monkeypatch):
    monkeypatch.setattr(train, "Net", None)  # and put it back in the end
    exec(SMALL_NETWORK, {"torch": torch, "train": train})
    assert train.main([*FLAGS, "--name", "one"]) == 0  # on one thread, as in torchrun's processes, which rounds alike
    two = torchrun("--max-restarts=1", driver(SMALL_NETWORK + KILLED_ONCE), *FLAGS, "--name", "two")
    assert two.returncode == 0, two.stderr
    assert "another process of this run died" in two.stderr
    assert "going on after 1 epochs" in two.stdout
    assert two.stdout.count("epoch 3/3: train") == 1  # only one of them speaks
    assert "2 processes" in two.stdout
    for column, values in history_of("one").items():
        if column.endswith("_loss"):
            assert history_of("two")[column] == pytest.approx(values, rel=1e-3), column
        elif column.endswith("_accuracy"):
            assert history_of("two")[column] == pytest.approx(values, abs=4), column  # two images of 51
        else:
            assert history_of("two")[column] == values, column


def test_several_machines_cannot_restart_with_one_store_for_all_starts(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), distributed.process_group("cpu"):
        pass


WHOLE_BATCH_NORM = """
import sys, weakref
sys.path.insert(0, {repository!r})
import torch
from torch import nn
from machinery import distributed

def grid(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 2).reshape(shape)

with distributed.process_group("cpu"):
    group = weakref.ref(torch.distributed.group.WORLD)
    start, end = ((0, 5), (5, 7))[distributed.rank()]
    images, weights = 50 + grid(7, 3, 4, 4), grid(7, 3, 4, 4).flip(0)
    torch.manual_seed(0)
    one = nn.BatchNorm2d(3, momentum=0.4).double()
    two = nn.Sequential(nn.BatchNorm2d(3, momentum=0.4).double())
    for layer in (one, two[0]):
        nn.init.uniform_(layer.weight, 1, 1.5), nn.init.constant_(layer.bias, 0.3)
    two[0].load_state_dict(one.state_dict())
    whole, part = images.clone().requires_grad_(), images[start:end].clone().requires_grad_()
    with torch.no_grad():
        one(whole)  # moves the statistics
    expected = one(whole)
    expected.mul(weights).sum().backward()
    with distributed.parallel(two) as network:
        with torch.no_grad():
            network(part)
        output = network(part)
        output.mul(weights[start:end]).sum().backward()
    torch.testing.assert_close(output, expected[start:end])
    torch.testing.assert_close(part.grad, whole.grad[start:end])
    for ours, theirs in zip(two.parameters(), one.parameters()):
        torch.testing.assert_close(2 * ours.grad, theirs.grad)  # DistributedDataParallel takes the mean of the two
    torch.testing.assert_close(dict(two[0].named_buffers()), dict(one.named_buffers()))
    torch.testing.assert_close(two(part), one(part))  # each alone again
    print("equal")
del network, output
assert group() is None, "a process group whose threads outlive Python's end aborts it now and then"
"""


def test_batchnorm_sees_the_whole_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WHOLE_BATCH_NORM.format(repository=str(Path(__file__).parents[1])))
    run = torchrun(script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("equal") == 2


def test_together_the_processes_meet_every_image_once_and_in_the_same_batches():
    samplers = [EpochSampler(262, seed=1), *(EpochSampler(262, seed=1, rank=rank, ranks=3) for rank in range(3))]
    for sampler in samplers:
        sampler.start = 60  # as after an interruption
    whole, *parts = map(list, samplers)
    assert [len(part) for part in parts] == [68, 67, 67]
    for start in range(0, 202, 30):
        batch = [pair for part in parts for pair in part[start // 3 : start // 3 + 10]]
        assert sorted(batch) == sorted(whole[start : start + 30])


def test_losses_of_the_processes_stand_in_the_order_of_the_batch(monkeypatch):
    whole = torch.arange(7.0)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: tensor)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.interleave_over_ranks(whole[rank::3], 7))
    assert torch.equal(sum(shares), whole)


@pytest.mark.parametrize("batch_size", [25, 66, 199])  # odd; 2 images too many for three; 1 for two
def test_what_the_processes_cannot_share_is_refused(batch_size, monkeypatch):
    ranks = 3 if batch_size == 66 else 2
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "once_per_machine", lambda make: make())
    with pytest.raises(SettingError, match=f"batch_size must be a multiple of the {ranks} processes"):
        make_loaders(Config(batch_size=batch_size))


def test_neither_can_they_share_one_image_that_skipping_leaves(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "once_per_machine", lambda make: make())
    make_loaders(Config(batch_size=50))
    with pytest.raises(SettingError, match="leave none of them without images in the last batch of the 200 or 101"):
        make_loaders(Config(batch_size=50, skip=0.495))
    make_loaders(Config(batch_size=50, skip=0.495, epochs=2))  # the first and the last, which skip nothing


def test_a_restart_goes_on_with_the_run_of_its_own_launch_only(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SettingError, match="with --max-restarts, a run needs a --name"):
        after_restart(Config(name="a"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(SettingError, match="with --max-restarts, a run needs a --name"):
        after_restart(Config())
    config = Config(name="a")
    assert after_restart(config) == config  # the first start
    Path("runs/a").mkdir(parents=True)
    checkpoint.lock(Path("runs/a"), "one").close()
    assert after_restart(config) == Config(name="a", overwrite=True)  # died before the first save
    Path("runs/a/last.pt").touch()
    assert after_restart(config).resume == "runs/a"
    assert after_restart(Config(name="a", overwrite=True)) == Config(name="a", resume="runs/a")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert after_restart(config) == config  # which is then refused, because the folder holds a run
