"""Disturbs trainings on two machines, and counts how they end: `make machines`, or `python benchmarks/machines.py`.

The machines are two network namespaces with host names and /etc/hosts of their own; both end with the script, and
where they cannot be made, it says so. They run `train.py` with a tiny network on a tiny CIFAR-10, and wait for one
another for seconds instead of minutes. Prints a table and saves it in benchmarks/machines.json.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import REPOSITORY, end_of, report, same

sys.path.insert(0, str(REPOSITORY / "tests"))

from conftest import TinyCIFAR10

from machinery.errors import CheckpointError

NAMES = "host-a", "host-b"
PATIENCE = 20  # seconds that a process waits for the others
LIMIT = 150  # seconds after which a command counts as hanging
DRIVER = """
import datetime, sys, time
sys.path.insert(0, {repository!r})
from torch import manual_seed, nn
from torchvision import datasets
for name, value in {expectations!r}.items():
    setattr(datasets.CIFAR10, name, value)
import train
from machinery import distributed, errors
distributed.PATIENCE = errors.PATIENCE = datetime.timedelta(seconds={patience})
class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(self.training * 0.25)
        return super().forward(images)
def network(classes=10):
    manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return Slow(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
train.Net = network
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
FLAGS = ["--epochs", "4", "--batch-size", "50", "--workers", "1", "--precision", "fp32", "--save-minutes", "0"]


def shell(command: str) -> str:
    """What a command prints; CalledProcessError if it fails."""
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


class TestBed:
    """Two machines, a link between them, and a folder that both have; all in namespaces that `main` has made."""

    def __init__(self) -> None:
        shell("mount -t tmpfs tmpfs /run")  # where `ip netns` keeps names
        self.home, self.folder, data = Path("/run/bed"), Path("/run/bed/shared"), Path("/run/bed/data")
        shell(f"mkdir -p {self.folder} {data}")
        self.tiny, self.number, self.dice = TinyCIFAR10(data), 0, random.Random(0)
        shell(" && ".join(f"ip netns add {name} && ip -n {name} link set lo up" for name in NAMES))
        shell("ip link add eth0 netns host-a type veth peer name eth0 netns host-b")
        for number, name in enumerate(NAMES, 1):
            shell(f"ip -n {name} address add 10.77.0.{number}/24 dev eth0 && ip -n {name} link set eth0 up")
            names = f"127.0.1.1 {name}\n127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n"  # as Debian has it
            (self.home / f"{name}.hosts").write_text(names)
        os.environ |= {"CIFAR10_ROOT": str(data), "PYTHONUNBUFFERED": "1"}
        self.start()
        if self.ends() != [0, 0]:
            raise RuntimeError(f"an undisturbed run failed:\n{self.output(0)}")
        self.undisturbed = end_of(self.run)

    def start(self, *flags: str, port: int = 29400, restarts: int = 0, other: Path = REPOSITORY) -> None:
        """A new run, with torchrun's command on each machine as the page says; the second one may have other code."""
        self.number += not flags
        command = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d".split()
        meeting = f"--rdzv-endpoint=host-a:{port + self.number} --rdzv-id=run{port}{self.number}"
        command += [*meeting.split(), f"--max-restarts={restarts}"]
        flags = flags or (*FLAGS, "--name", f"run{self.number}")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(restarts > 0))
        self.commands = []
        for name, repository in zip(NAMES, (REPOSITORY, other), strict=True):
            driver, facts = self.home / f"{name}.py", {"patience": PATIENCE, "expectations": self.tiny.expectations()}
            driver.write_text(DRIVER.format(repository=str(repository), **facts))
            inside = f'hostname {name} && mount --bind {self.home}/{name}.hosts /etc/hosts && exec "$@"'
            apart = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
            with (self.home / f"{name}.log").open("w") as log:
                whole = [*apart, *command, str(driver), *flags]
                self.commands.append(subprocess.Popen(whole, cwd=self.folder, stdout=log, stderr=log))

    def start_and_wait(self, restarts: int = 0) -> None:
        """Until a random instant of training."""
        self.start(restarts=restarts)
        self.wait(lambda: "epoch 1/" in self.output(0))
        time.sleep(self.dice.uniform(0, 2))

    def wait(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"still waiting after {LIMIT} s")
            time.sleep(0.1)

    def output(self, number: int) -> str:
        return (self.home / f"{NAMES[number]}.log").read_text()

    def processes(self, number: int, training: bool = False) -> list[int]:
        """Of a machine; or only those that torchrun started, the first one first, and those that prepare its images."""
        found = "for pid in $(ip netns pids {}); do {} echo $pid; done; true"
        only = "grep -qsz ^RANK= /proc/$pid/environ &&" if training else ""
        return sorted(map(int, shell(found.format(NAMES[number], only)).split()))

    def kill(self, pids: list[int]) -> None:
        shell(f"kill -KILL {' '.join(map(str, pids))} || true")  # some may be gone

    def cut(self) -> None:
        """Lets each machine send to an address that nobody has, so that everything is lost in silence."""
        shell("ip -n host-a neigh replace 10.77.0.2 lladdr 02:00:00:00:00:00 dev eth0 nud permanent")
        shell("ip -n host-b neigh replace 10.77.0.1 lladdr 02:00:00:00:00:00 dev eth0 nud permanent")

    def mend(self) -> None:
        shell("ip -n host-a neigh del 10.77.0.2 dev eth0 && ip -n host-b neigh del 10.77.0.1 dev eth0")

    def ends(self) -> list[int]:
        """The exit statuses of both commands, when no process is left on either machine."""
        self.wait(lambda: all(command.poll() is not None for command in self.commands))
        self.wait(lambda: not self.processes(0) + self.processes(1))
        return [command.wait() for command in self.commands]

    @property
    def run(self) -> Path:
        return self.folder / f"runs/run{self.number}"

    def ends_as_undisturbed(self) -> bool:
        """Whether the run ends with the weights and the history of the undisturbed one, bit for bit."""
        return self.ends() == [0, 0] and same(end_of(self.run), self.undisturbed)

    def goes_on(self) -> bool:
        """Whether last.pt is whole, and a new start with --resume ends as the undisturbed run."""
        self.start("--resume", f"runs/run{self.number}", port=39400)
        return self.ends_as_undisturbed()


def other_machine_killed(bed: TestBed) -> bool:
    bed.start_and_wait()
    bed.kill(bed.processes(1))
    status, told = bed.ends()[0], ("another process of this run died", f"--resume runs/run{bed.number}")
    return status != 0 and all(words in bed.output(0) for words in told) and bed.goes_on()


def link_cut_for_good(bed: TestBed) -> bool:
    bed.start_and_wait()
    bed.cut()
    bed.wait(lambda: not bed.processes(0, training=True) + bed.processes(1, training=True))
    bed.mend()  # torchrun of the machine that is cut off waits for it, or for TCP to give up
    told = all(f"did not answer for {PATIENCE} s" in bed.output(number) for number in range(2))
    return 0 not in bed.ends() and told and bed.goes_on()


def link_cut_shortly(bed: TestBed) -> bool:
    bed.start_and_wait()
    bed.cut()
    time.sleep(bed.dice.uniform(2, PATIENCE / 3))
    bed.mend()
    return bed.ends_as_undisturbed()


def process_killed_and_restarted(bed: TestBed) -> bool:
    bed.start_and_wait(restarts=3)
    bed.kill(bed.processes(bed.dice.randrange(2), training=True)[:1])
    return bed.ends_as_undisturbed()


def other_code(bed: TestBed) -> bool:
    copy = bed.home / f"copy{bed.number}"
    shell(f"mkdir {copy} && cp -r {REPOSITORY}/*.py {REPOSITORY}/machinery {copy}; echo '# other' >> {copy}/model.py")
    bed.start(other=copy)
    refused = 0 not in bed.ends() and not bed.run.exists()
    words = "the machines differ", "model.py is", "host-a (machine 0)", "host-b (machine 1)"
    return refused and all(word in bed.output(number) for number in range(2) for word in words)


GO_ON = "stops with a sentence; resumed, it ends as undisturbed"
SAME = "ends as undisturbed, bit for bit"
REFUSED = "is refused before any work, by name"
# What is done to a run, how often, by what, which returns whether it ended as promised, and the promise.
DISTURBANCES: tuple[tuple[str, int, Callable[[TestBed], bool], str], ...] = (
    ("a machine killed", 3, other_machine_killed, GO_ON),
    ("the link cut for good", 2, link_cut_for_good, GO_ON),
    ("the link cut for up to a third of the patience", 2, link_cut_shortly, SAME),
    ("a process killed, with `--max-restarts=3`", 2, process_killed_and_restarted, SAME),
    ("another model.py on one machine", 1, other_code, REFUSED),
)


def experiment(only: list[str], once: bool) -> int:
    """Returns the exit status: 0 if all ended as promised."""
    bed, rows = TestBed(), []
    for harm, times, disturb, promise in DISTURBANCES:
        times = (1 if once else times) if disturb.__name__ in only or not only else 0
        kept = 0
        for _ in range(times):
            try:
                ended_well, fault = disturb(bed), ""
            except (TimeoutError, CheckpointError, OSError) as error:
                ended_well, fault = False, f"{type(error).__name__}: {error}"
            print(f"{'as promised' if ended_well else 'NOT as promised'}: {harm} {fault}", flush=True)
            if not ended_well:
                print(f"host-a:\n{bed.output(0)[-6000:]}\nhost-b:\n{bed.output(1)[-6000:]}", flush=True)
            kept += ended_well
            bed.kill(bed.processes(0) + bed.processes(1))
        rows.append((harm, times, kept, promise))
    if not (only or once):
        report("machines", ("done", "times", "as promised", "promised"), rows, patience_in_seconds=PATIENCE)
    return int(any(times != kept for _, times, kept, _ in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only the disturbances of these names")
    parser.add_argument("--once", action="store_true", help="each once, and nothing is saved")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.exit(experiment(arguments.only, arguments.once))
    apart = "unshare --net --mount --uts --pid --fork --kill-child --mount-proc"
    apart += "" if os.geteuid() == 0 else " --user --map-root-user"
    if subprocess.run(f"{apart} ip link add x type veth", shell=True, capture_output=True, check=False).returncode:
        print("skipped: this needs Linux, iproute2, and the right to make network namespaces")
        sys.exit()
    inside = [*apart.split(), sys.executable, __file__, "--inside", *sys.argv[1:]]
    sys.exit(subprocess.run(inside, check=False).returncode)


if __name__ == "__main__":
    main()
