"""Two machines on one: network namespaces with a wire between them that can be cut, lose packets and delay them.

Each has an address, a host name and an /etc/hosts of its own. All of it lies in namespaces that end with the script,
however it ends, and nothing is sent elsewhere. What they run is `train.py` with a tiny network on a tiny CIFAR-10, so
that a training takes seconds, and with a shorter patience than usual, so that a cut is noticed in seconds.
"""

import contextlib
import heapq
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from common import FOLDER
from survival import TinyCIFAR10, end_of, same

from machinery import checkpoint

REPOSITORY = FOLDER.parent
PATIENCE = 20  # seconds that a process waits for the others
LIMIT = 150  # seconds after which a command counts as hanging
DRIVER = """
import os, sys, time
sys.path.insert(0, {repository!r})
from datetime import timedelta
from torch import manual_seed, nn
from torchvision import datasets
for name, value in {expectations!r}.items():
    setattr(datasets.CIFAR10, name, value)
import train
from machinery import distributed, folder
from machinery.data import cifar10
distributed.PATIENCE = timedelta(seconds={patience})
class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(self.training * float(os.environ["STEP"]))
        return super().forward(images)
def network(classes=10):
    manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return Slow(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
train.Net = network
{patch}
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
FLAGS = ["--epochs", "4", "--batch-size", "50", "--workers", "1", "--precision", "fp32", "--save-minutes", "0"]


class Wire(threading.Thread):
    """Carries frames from one interface to the other and back, but for what it is told to lose, and when it is cut."""

    def __init__(self, *interfaces: str) -> None:
        super().__init__(daemon=True)
        self.cut, self.loss, self.delay, self.dice = False, 0.0, 0.0, random.Random(0)
        every_protocol, packet_level, with_offload_header = 3, 263, 15  # of linux/if_packet.h; unsummed frames stay so
        self.ends = []
        for interface in interfaces:
            end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(every_protocol))
            end.setsockopt(packet_level, with_offload_header, 1)
            end.bind((interface, 0))
            self.ends.append(end)

    def run(self) -> None:
        number = itertools.count()
        flying: list[tuple[float, int, socket.socket, bytes]] = []  # when and where each frame will arrive
        while True:
            pause = max(0, flying[0][0] - time.monotonic()) if flying else None
            for end in select.select(self.ends, [], [], pause)[0]:
                frame, source = end.recvfrom(1 << 18)
                if source[2] != socket.PACKET_OUTGOING and not self.cut and self.dice.random() >= self.loss:
                    other = self.ends[end is self.ends[0]]
                    heapq.heappush(flying, (time.monotonic() + self.delay, next(number), other, frame))
            while flying and flying[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(flying)
                with contextlib.suppress(OSError):  # as a full queue would, and TCP sends it again
                    end.send(frame)


class Machine:
    """A network namespace with a host name of its own; a command at a time runs there, in `folder`."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = f"host-{'ab'[number]}", f"10.77.0.{number + 1}", folder
        self.hosts, self.output = folder.parent / f"{self.name}.hosts", folder.parent / f"{self.name}.log"
        self.command: subprocess.Popen | None = None
        for line in (
            f"ip netns add {self.name}",
            f"ip link add wire{number} type veth peer name eth0 netns {self.name}",
            f"ip link set wire{number} up",
            f"ip -n {self.name} address add {self.address}/24 dev eth0",
            f"ip -n {self.name} link set eth0 up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(line.split(), check=True)
        self.inode = os.stat(f"/run/netns/{self.name}").st_ino

    def knows(self, *others: "Machine") -> None:
        """Its /etc/hosts: its own name is a loopback address, as Debian writes it."""
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name}"]
        self.hosts.write_text("\n".join([*lines, *(f"{other.address} {other.name}" for other in others), ""]))

    def start(
        self, *command: object, folder: Path | None = None, environment: Mapping[str, object] | None = None
    ) -> subprocess.Popen:
        inside = f'hostname {self.name} && mount --bind {self.hosts} /etc/hosts && exec "$@"'
        with self.output.open("a") as output:
            self.command = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
                + [str(part) for part in command],
                cwd=folder or self.folder,
                env=os.environ | {name: str(value) for name, value in (environment or {}).items()},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self.command

    def processes(self) -> list[int]:
        """Those that live."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # of one that is gone
                if (path / "ns/net").stat().st_ino == self.inode:
                    found.append(int(path.name))
        return found

    def works(self) -> bool:
        """Whether its command or any process lives."""
        return bool(self.command and self.command.poll() is None) or bool(self.processes())

    def trainers(self) -> list[int]:
        """The processes that torchrun started, without those which prepare images for them."""
        parents = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return [pid for pid, parent in parents.items() if parent not in parents]

    def kill(self, pids: list[int] | None = None) -> None:
        """Some processes at once; by default all, torchrun too."""
        for pid in self.processes() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def says(self, text: str) -> bool:
        return text in self.output.read_text()


class Laboratory:
    """Two machines, the wire between them, and a folder that both have; for a script that `inside` runs."""

    def __init__(self) -> None:
        # Where `ip netns` keeps names, and where all files are, so that they vanish as well.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        self.folder, self.dice = self.made(Path("/run/laboratory/shared")), random.Random(0)
        self.tiny = TinyCIFAR10(self.made(self.folder.parent / "data"))
        self.machines = [Machine(number, self.folder) for number in range(2)]
        self.wire = Wire("wire0", "wire1")
        self.wire.start()
        self.number = 0
        os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "STEP": "0.25"}
        os.environ |= {"CIFAR10_ROOT": str(self.tiny.root), "PYTHONUNBUFFERED": "1"}

    @staticmethod
    def made(path: Path) -> Path:
        path.mkdir(parents=True)
        return path

    @property
    def run(self) -> Path:
        """Where the run of the present trial is saved."""
        return self.folder / f"runs/run{self.number}"

    def begin(self) -> None:
        """A new trial: everything as it should be, nothing running, empty logs."""
        self.number += 1
        self.wire.cut, self.wire.loss, self.wire.delay = False, 0.0, 0.0
        for machine, other in (self.machines, self.machines[::-1]):
            machine.kill()
            machine.output.write_text("")
            machine.knows(other)

    def driver(self, patch: str = "", repository: Path = REPOSITORY) -> Path:
        path = self.folder.parent / f"train{self.number}{len(patch)}.py"
        content = {"repository": str(repository), "expectations": self.tiny.expectations()}
        path.write_text(DRIVER.format(**content, patience=PATIENCE, patch=patch))
        return path

    def command(self, *flags: str, torchrun: tuple[str, ...] = (), script: Path | None = None) -> list[object]:
        """torchrun's on each machine, as the page says; what comes again in `torchrun` replaces what came before."""
        meeting = [f"--rdzv-endpoint=host-a:{29400 + self.number}", f"--rdzv-id=trial{self.number}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", *meeting, *torchrun, str(script or self.driver())]
        return [*command, *(flags or (*FLAGS, "--name", self.run.name))]

    def start(
        self, *flags: str, torchrun: tuple[str, ...] = (), environment: Mapping[str, object] | None = None
    ) -> None:
        """The same command on both machines."""
        for machine in self.machines:
            machine.start(*self.command(*flags, torchrun=torchrun), environment=environment)

    def wait(self, condition: Callable[[], object], limit: float = LIMIT) -> None:
        """Until it holds, or it cannot any more, since nothing runs."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"still waiting after {limit} s")
            if not any(machine.works() for machine in self.machines) and not condition():
                raise ChildProcessError("all processes ended too early")
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        """Until one of the machines says it."""
        self.wait(lambda: any(machine.says(text) for machine in self.machines))

    def ends(self, limit: float = LIMIT) -> list[int]:
        """The exit statuses of both commands, when no process is left on either machine."""
        end = time.monotonic() + limit
        while any(machine.works() for machine in self.machines):
            if time.monotonic() > end:
                raise TimeoutError(f"processes were left after {limit} s")
            time.sleep(0.05)
        return [machine.command.wait() for machine in self.machines if machine.command]

    def at_peace(self) -> bool:
        """Whether the run ended as the one in peace, to the last bit."""
        return same(end_of(self.run), self.peace)

    def goes_on(self) -> bool:
        """Whether last.pt is whole, and a new start with --resume ends as the run in peace."""
        number = self.run.name
        checkpoint.load(self.run / "last.pt")
        for machine in self.machines:
            machine.output.write_text("")
        meeting = (f"--rdzv-id=again{self.number}", f"--rdzv-endpoint=host-a:{39400 + self.number}")
        self.start("--resume", f"runs/{number}", torchrun=meeting)
        return self.ends() == [0, 0] and self.at_peace()

    def measure_peace(self) -> None:
        """One process, and then one on each machine, undisturbed: what all others are compared with."""
        self.begin()
        self.machines[0].start(sys.executable, self.driver(), *FLAGS, "--name", "alone")
        if self.ends() == [0]:
            self.begin()
            self.start()
        if self.ends() != [0, 0]:
            raise RuntimeError("a run in peace failed:\n" + "\n".join(m.output.read_text() for m in self.machines))
        self.peace, self.alone = end_of(self.run), end_of(self.folder / "runs/alone")


def inside(script: str, limit: float, *arguments: str) -> int | None:
    """Runs a script of Python in namespaces of its own, for at most `limit` seconds; all that it starts ends with it.

    Returns:
        Its exit status; None if there is no right to such namespaces, or no program to make them.
    """
    apart = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    apart += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        subprocess.run([*apart, "ip", "link", "add", "x", "type", "veth"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return subprocess.run([*apart, sys.executable, script, *arguments], check=False, timeout=limit).returncode
