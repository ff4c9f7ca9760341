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
from machinery.data.augment import EpochSampler
from machinery.run import after_restart
from train import Config, SettingError

# Of 200 images 144 are trained on: three batches of 48. Skipping half of them leaves 72: one batch of 48, one of 24.
FLAGS = ["--epochs", "3", "--batch-size", "48", "--holdout", "56", "--workers", "0", "--precision", "fp32"]
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
torch.cpu.get_capabilities = dict  # so that the optimizer works in fp32, which rounds less than bf16
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250)


def history_of(name: str) -> dict[str, list]:
    history = json.loads(Path("runs", name, "metrics.json").read_text())["history"]
    return {column: values for column, values in history.items() if column != "seconds"}


# The second process dies when the first has saved an epoch.
KILLED_ONCE = """
from machinery import distributed
def evaluate_and_die(*arguments, evaluate=train.evaluate, **options):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.path.exists("runs/two/metrics.json"):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*arguments, **options)
train.evaluate = evaluate_and_die
"""


def test_two_processes_learn_what_one_learns_though_one_is_killed_and_restarted(driver, monkeypatch):
    monkeypatch.setattr(train, "Net", None)  # and put back what the next line sets
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    exec(SMALL_NETWORK, {"torch": torch, "train": train})
    assert train.main([*FLAGS, "--name", "one"]) == 0  # on one thread, as in torchrun's processes, which rounds alike
    two = torchrun("--max-restarts=1", driver(SMALL_NETWORK + KILLED_ONCE), *FLAGS, "--name", "two")
    assert two.returncode == 0, two.stderr
    assert "another process of this run died" in two.stderr
    assert "going on after 1 epochs" in two.stdout
    assert two.stdout.count("epoch 3/3: train") == 1  # only one of them prints
    assert "2 processes" in two.stdout
    for column, values in history_of("one").items():
        if column.endswith("_loss"):
            assert history_of("two")[column] == pytest.approx(values, rel=1e-3), column
        elif column.endswith("_accuracy"):
            assert history_of("two")[column] == pytest.approx(values, abs=4), column  # two images of 56
        else:
            assert history_of("two")[column] == values, column


# What two processes do in a script of the user's own, and inside a process group.
TOGETHER = """
import time, weakref
import pytest
from torch import distributed as dist, nn
from dataset import CIFAR10
from machinery import distributed
from train import Config, SettingError, evaluate, fit

number = int(os.environ["RANK"])
dist.init_process_group("gloo")
if number == 1:  # nobody is waited for
    evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), [(torch.zeros(2, 3, 32, 32), torch.zeros(2).long())])
assert (distributed.rank(), distributed.world_size()) == (0, 1)

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3072, 10), nn.Linear(3072, 10)
    def forward(self, x):
        return self.used(x.flatten(1))

sets = {"train_set": CIFAR10(data="synthetic").subset(range(60)), "test_set": CIFAR10(train=False).subset(range(4))}
config = Config(epochs=1, batch_size=20, workers=0, name="unused")
with pytest.raises(SettingError, match="spare.weight, spare.bias got no gradient"):
    fit(config, Unused(), **sets)
dist.destroy_process_group()

with pytest.raises(SettingError, match="code is 0 on .*, 1 on .*host 1.*; seed is missing on .*, 5 on .*host 1"):
    distributed.socket.gethostname = lambda: f"host {number}"
    with distributed.process_group("cpu", {"code": str(number), "torch": "2"} | ({"seed": "5"} if number else {})):
        pass

def grid(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 2).reshape(shape)

with distributed.process_group("cpu", {}):
    group = weakref.ref(torch.distributed.group.WORLD)
    assert (distributed.rank(), distributed.world_size()) == (number, 2)
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size(), distributed.gather(number)) == (0, 1, [number])
        with distributed.process_group("cpu", {}):  # as when a callback calls `fit`
            assert distributed.world_size() == 1
    assert distributed.max_over_ranks(number) == 1
    assert distributed.interleave_over_ranks(torch.tensor([0.1, 0.3]) + number).tolist() == [
        *torch.tensor([0.1, 1.1, 0.3, 1.3])
    ]
    assert distributed.broadcast_from_rank_0(lambda: f"by {number}") == "by 0"
    for share in (distributed.broadcast_from_rank_0, distributed.once_per_machine):
        with pytest.raises(FileNotFoundError, match="/nowhere"):
            share(lambda: open("/nowhere"))
    distributed.once_per_machine(lambda: (time.sleep(1), open("made", "x").close()))  # "x": not twice
    assert os.path.exists("made")

    images, weights = 50 + grid(6, 3, 4, 4), grid(6, 3, 4, 4).flip(0)
    mine = slice(3 * number, 3 * number + 3)
    torch.manual_seed(0)
    one = nn.BatchNorm2d(3, momentum=0.4).double()
    two = nn.Sequential(nn.BatchNorm2d(3, momentum=0.4).double())
    for layer in (one, two[0]):
        nn.init.uniform_(layer.weight, 1, 1.5), nn.init.constant_(layer.bias, 0.3)
    two[0].load_state_dict(one.state_dict())
    whole, part = images.clone().requires_grad_(), images[mine].clone().requires_grad_()
    with torch.no_grad():
        one(whole)  # moves the statistics
    expected = one(whole)
    expected.mul(weights).sum().backward()
    with distributed.parallel(two) as network:
        with torch.no_grad():
            network(part)
        output = network(part)
        output.mul(weights[mine]).sum().backward()
    torch.testing.assert_close(output, expected[mine])
    torch.testing.assert_close(part.grad, whole.grad[mine])
    for ours, theirs in zip(two.parameters(), one.parameters()):
        torch.testing.assert_close(2 * ours.grad, theirs.grad)  # DistributedDataParallel takes the mean of the two
    torch.testing.assert_close(dict(two[0].named_buffers()), dict(one.named_buffers()))
    torch.testing.assert_close(two(part), one(part))  # each alone again
del network, output
assert group() is None, "a process group whose threads outlive Python's end aborts it now and then"
print("as promised")
sys.exit()  # before what the driver does otherwise
"""


def test_two_processes_wait_for_one_another_only_inside_a_process_group(driver):
    run = torchrun(driver(TOGETHER))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("as promised") == 2


def test_together_the_processes_meet_every_image_once_and_in_the_same_batches():
    samplers = [EpochSampler(261, seed=1), *(EpochSampler(261, seed=1, rank=rank, ranks=3) for rank in range(3))]
    for sampler in samplers:
        sampler.start = 60  # as after an interruption
    whole, *parts = map(list, samplers)
    assert [len(part) for part in parts] == [67, 67, 67]
    for start in range(0, 201, 30):
        batch = [pair for part in parts for pair in part[start // 3 : start // 3 + 10]]
        assert sorted(batch) == sorted(whole[start : start + 30])


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "once_per_machine", lambda make: make())
    with pytest.raises(SettingError, match="batch_size must be a multiple of the 2 processes"):
        make_loaders(Config(batch_size=25))


def test_a_restart_goes_on_with_the_run_of_its_own_launch_only(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SettingError, match="with --max-restarts, a run needs a --name"):
        after_restart(Config(name="a"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(SettingError, match="with --max-restarts, a run needs a --name"):
        after_restart(Config())
    config = Config(name="a")
    assert after_restart(config) == config  # the first start, or one that died before it saved
    checkpoint.write_whole(Path("runs/a/last.pt"), checkpoint.packed({"launch": "one"}))
    for given in (config, Config(name="a", overwrite=True)):
        assert after_restart(given) == Config(name="a", resume="runs/a")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert after_restart(config) == config  # which is then refused, because the folder holds a run
    assert after_restart(Config(name="a", overwrite=True)).overwrite
