"""Does harm to trainings on two machines, and counts how they end: `make machines`, or `python benchmarks/machines.py`.

The machines are two network namespaces, each with its own address, host name and /etc/hosts, and between them a wire
that can be cut, lose packets and delay them. All of it lies in namespaces that end with this script, however it ends;
nothing is sent elsewhere. Where such namespaces cannot be made, it says so and does nothing.

The training is `train.py` with a tiny network on a tiny CIFAR-10, so that a run takes seconds, and with a shorter
patience than usual, so that a cut is noticed in seconds. Prints a table and saves it in benchmarks/machines.json.
"""

import argparse
import contextlib
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from common import FOLDER, report
from survival import TinyCIFAR10, end_of, same

from machinery import files
from machinery.errors import CheckpointError

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
from machinery import data, folder, processes
processes.PATIENCE = timedelta(seconds={patience})
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
EPOCHS = 4
PEACE = "ended with the weights, to the last bit, of a run in peace"
GO_ON = "ended with a sentence; last.pt was whole, and went on to the weights of a run in peace"
REFUSED = "refused before any work, on both machines, in a sentence that names it"


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
        """The processes that torchrun started, without those that prepare images."""
        return [pid for pid in self.processes() if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()][:1]

    def kill(self, pids: list[int] | None = None) -> None:
        """Some processes at once; by default all, torchrun too."""
        for pid in self.processes() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def says(self, text: str) -> bool:
        return text in self.output.read_text()


class Laboratory:
    """Two machines, the wire between them, and a folder that both have as theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dice = folder / "shared", random.Random(0)
        self.folder.mkdir()
        self.tiny = TinyCIFAR10(self._made(folder / "data"))
        self.machines = [Machine(number, self.folder) for number in range(2)]
        self.wire = Wire("wire0", "wire1")
        self.wire.start()
        self.number = 0
        os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "STEP": "0.25"}
        os.environ |= {
            "CIFAR10_ROOT": str(self.tiny.root),
            "CIFAR10_URL": "http://127.0.0.1:9/",
            "PYTHONUNBUFFERED": "1",
        }

    @staticmethod
    def _made(path: Path) -> Path:
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
        files.load(self.run / "last.pt")
        for machine in self.machines:
            machine.output.write_text("")
        meeting = (f"--rdzv-id=again{self.number}", f"--rdzv-endpoint=host-a:{39400 + self.number}")
        self.start("--resume", f"runs/{number}", torchrun=meeting)
        return self.ends() == [0, 0] and self.at_peace()

    def measure_peace(self) -> dict[str, float]:
        """One process, and then one on each machine, undisturbed; how far their losses are apart, relatively."""
        self.begin()
        self.machines[0].start(sys.executable, self.driver(), *FLAGS, "--name", "alone")
        if self.ends() == [0]:
            self.begin()
            self.start()
        if self.ends() != [0, 0]:
            raise RuntimeError("a run in peace failed:\n" + "\n".join(m.output.read_text() for m in self.machines))
        self.peace, self.alone = end_of(self.run), end_of(self.folder / "runs/alone")
        return apart(self.peace["history"], self.alone["history"])


def apart(history: dict[str, list], other: dict[str, list]) -> dict[str, float]:
    """The largest relative difference of losses, and the largest difference of accuracies in percent."""
    pairs = {
        kind: [
            (a, b)
            for column in history
            if column.endswith(kind)
            for a, b in zip(history[column], other[column], strict=True)
        ]
        for kind in ("loss", "accuracy")
    }
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in pairs["loss"]),
        "accuracy": max(abs(a - b) for a, b in pairs["accuracy"]),
    }


# What is done to a run, how often, and what is promised. Each returns whether the promise was kept.


def machine_killed(lab: Laboratory, victim: int) -> bool:
    lab.start()
    lab.wait_for("epoch 1/")
    time.sleep(lab.dice.uniform(0, 2))
    lab.machines[victim].kill()
    survivor = lab.machines[1 - victim]
    statuses = lab.ends()
    told = survivor.says("another process of this run died") and survivor.says(f"--resume runs/{lab.run.name}")
    return statuses[1 - victim] != 0 and told and lab.goes_on()


def first_machine_killed(lab: Laboratory) -> bool:
    return machine_killed(lab, 0)


def other_machine_killed(lab: Laboratory) -> bool:
    return machine_killed(lab, 1)


RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}


def process_killed_and_restarted(lab: Laboratory) -> bool:
    lab.start(torchrun=("--max-restarts=3",), environment=RESTARTS)
    lab.wait_for("epoch 1/")
    time.sleep(lab.dice.uniform(0, 2))
    victim = lab.dice.choice(lab.machines)
    victim.kill(victim.trainers())
    return lab.ends() == [0, 0] and lab.at_peace()


def machine_killed_and_started_again(lab: Laboratory) -> bool:
    lab.start(torchrun=("--max-restarts=3",), environment=RESTARTS)
    lab.wait_for("epoch 1/")
    time.sleep(lab.dice.uniform(0, 2))
    other = lab.machines[1]
    other.kill()
    time.sleep(2)
    other.start(*lab.command(torchrun=("--max-restarts=3",)), environment=RESTARTS)
    return lab.ends() == [0, 0] and lab.at_peace()


def link_cut_for_good(lab: Laboratory) -> bool:
    lab.start()
    lab.wait_for("epoch 1/")
    time.sleep(lab.dice.uniform(0, 2))
    lab.wire.cut = True
    statuses = lab.ends()
    lab.wire.cut = False
    told = [machine.says(f"did not answer for {PATIENCE} s") for machine in lab.machines]
    return 0 not in statuses and all(told) and lab.goes_on()


def link_cut_shortly(lab: Laboratory) -> bool:
    lab.start()
    lab.wait_for("epoch 1/")
    time.sleep(lab.dice.uniform(0, 2))
    lab.wire.cut = True
    time.sleep(lab.dice.uniform(2, PATIENCE / 3))
    lab.wire.cut = False
    return lab.ends() == [0, 0] and lab.at_peace()


def packets_lost_and_late(lab: Laboratory) -> bool:
    lab.wire.loss, lab.wire.delay = 0.05, 0.1
    lab.start()
    return lab.ends() == [0, 0] and lab.at_peace()


def slow_download(lab: Laboratory) -> bool:
    first, other = lab.machines
    server = lab.folder.parent / "server.py"
    server.write_text(SERVER.format(archive=str(lab.tiny.archive), seconds=1.5 * PATIENCE))
    serving = first.start(sys.executable, server)
    first.start(*lab.command())
    empty = {"CIFAR10_ROOT": lab.folder.parent / f"empty-{lab.number}", "CIFAR10_URL": f"http://{first.address}:8000/"}
    started = time.monotonic()
    training = other.start(*lab.command(), environment=empty)
    while training.poll() is None and time.monotonic() - started < LIMIT:
        time.sleep(0.1)
    serving.kill()
    return lab.ends() == [0, 0] and time.monotonic() - started > 1.5 * PATIENCE and lab.at_peace()


SERVER = """
import http.server, time
content = open({archive!r}, "rb").read()
class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        size = len(content) // 30 + 1
        for start in range(0, len(content), size):
            time.sleep({seconds} / 30)
            self.wfile.write(content[start : start + size])
http.server.HTTPServer(("", 8000), Slow).serve_forever()
"""


def refused(lab: Laboratory, *sentences: str, machines: tuple[int, ...] = (0, 1)) -> bool:
    """Whether both commands fail, these machines say all of this, and there is no run."""
    statuses = lab.ends()
    told = all(lab.machines[number].says(sentence) for number in machines for sentence in sentences)
    return 0 not in statuses and told and not lab.run.exists()


def folders_not_shared(lab: Laboratory) -> bool:
    own = lab._made(lab.folder.parent / f"own-{lab.number}")
    for machine, folder in zip(lab.machines, (lab.folder, own), strict=True):
        machine.start(*lab.command(), folder=folder)
    return refused(lab, "share this folder", "host-b (machine 1)") and not (own / "runs").exists()


def other_on_one(lab: Laboratory, sentence: str, patch: str = "", repository: Path = REPOSITORY, *flags: str) -> bool:
    first, other = lab.machines
    first.start(*lab.command(*flags))
    other.start(*lab.command(*flags, script=lab.driver(patch, repository)))
    return refused(lab, "the machines differ", sentence, "host-a (machine 0)", "host-b (machine 1)")


def other_torch(lab: Laboratory) -> bool:
    patch = "true = folder.version\nfolder.version = lambda name: '2.13.0' if name == 'torch' else true(name)"
    return other_on_one(lab, "torch is", patch)


def other_code(lab: Laboratory) -> bool:
    copy = lab.folder.parent / f"copy-{lab.number}"
    shutil.copytree(REPOSITORY / "machinery", copy / "machinery", ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, copy)
    with (copy / "model.py").open("a") as file:
        file.write("# another one\n")
    return other_on_one(lab, "model.py is", "pass", copy)


def other_data(lab: Laboratory) -> bool:
    patch = (
        "drawn = data.draw_synthetic\ndata.draw_synthetic = lambda *a, **k: [v[::-1].copy() for v in drawn(*a, **k)]"
    )
    flags = [*FLAGS, "--data", "synthetic", "--name", lab.run.name]
    return other_on_one(lab, "dataset 1 is", patch, REPOSITORY, *flags)


def other_settings(lab: Laboratory) -> bool:
    first, other = lab.machines
    first.start(*lab.command())
    other.start(*lab.command(*FLAGS, "--lr", "0.1", "--name", lab.run.name))
    return refused(lab, "the machines differ", "lr is 0.12 on host-a (machine 0), 0.1 on host-b (machine 1)")


def names_unknown(lab: Laboratory) -> bool:
    for number, machine in enumerate(lab.machines):
        machine.knows()
        by_address = (f"--rdzv-endpoint=10.77.0.1:{29400 + lab.number}", f"--rdzv-conf=is_host={1 - number}")
        machine.start(*lab.command(torchrun=by_address))
    return refused(lab, "--local-addr=ADDRESS", machines=(1,)) and lab.machines[0].says("did not answer")


def by_addresses(lab: Laboratory) -> bool:
    for number, machine in enumerate(lab.machines):
        machine.knows()
        by_address = (f"--rdzv-endpoint=10.77.0.1:{29400 + lab.number}", f"--rdzv-conf=is_host={1 - number}")
        machine.start(*lab.command(torchrun=(*by_address, f"--local-addr={machine.address}")))
    return lab.ends() == [0, 0] and lab.at_peace()


def restarts_with_one_store(lab: Laboratory) -> bool:
    lab.start(torchrun=("--max-restarts=3",))
    return refused(lab, "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


def from_two_to_one_and_back(lab: Laboratory) -> bool:
    elastic = ("--nnodes=1:2", "--max-restarts=3", "--rdzv-conf=last_call_timeout=5")
    slower = {**RESTARTS, "STEP": 1.5}
    first, other = lab.machines
    lab.start(torchrun=elastic, environment=slower)
    lab.wait_for("epoch 1/")
    other.kill()
    lab.wait(lambda: first.output.read_text().count("parameters, on") == 2)  # alone
    other.start(*lab.command(torchrun=elastic), environment=slower)
    ended = lab.ends() == [0, 0]
    counts = [line.count("2 processes") for line in first.output.read_text().splitlines() if "parameters, on" in line]
    distance = apart(end_of(lab.run)["history"], lab.peace["history"])
    return ended and counts == [1, 0, 1] and distance["loss"] < 1e-3 and distance["accuracy"] <= 1


TRIALS: tuple[tuple[str, int, Callable[[Laboratory], bool], str], ...] = (
    ("the first machine's processes killed", 3, first_machine_killed, GO_ON),
    ("the other machine's processes killed", 3, other_machine_killed, GO_ON),
    ("the link cut for good", 2, link_cut_for_good, GO_ON),
    ("the link cut for up to a third of the patience", 2, link_cut_shortly, PEACE),
    ("5 % of the packets lost, and all 100 ms late", 2, packets_lost_and_late, PEACE),
    ("a process killed, with `--max-restarts=3`", 2, process_killed_and_restarted, PEACE),
    (
        "a machine killed, and its command given again, with `--max-restarts=3`",
        2,
        machine_killed_and_started_again,
        PEACE,
    ),
    ("one machine's download takes longer than the patience", 1, slow_download, PEACE),
    ("names unknown, addresses given", 1, by_addresses, PEACE),
    (
        "from two machines to one and back, with `--nnodes=1:2`",
        1,
        from_two_to_one_and_back,
        "ended with the learning curve of a run in peace, but for rounding",
    ),
    ("`runs/` not shared", 1, folders_not_shared, REFUSED),
    ("another version of torch on one machine (feigned)", 1, other_torch, REFUSED),
    ("another model.py on one machine", 1, other_code, REFUSED),
    ("other images on one machine", 1, other_data, REFUSED),
    ("another `--lr` on one machine", 1, other_settings, REFUSED),
    ("`--max-restarts` with one store for all starts", 1, restarts_with_one_store, REFUSED),
    ("names unknown", 1, names_unknown, "refused in a sentence that says what to do; the other machine gave up, too"),
)


def experiment(only: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder))
        distance = lab.measure_peace()
        print(f"in peace, two machines and one process: {distance}", flush=True)
        rows, runs = [], []
        for harm, times, trial, promise in TRIALS:
            if only and not any(word in trial.__name__ for word in only):
                continue
            kept = []
            for _ in range(times):
                lab.begin()
                started = time.monotonic()
                try:
                    kept.append(trial(lab))
                    fault = "" if kept[-1] else "another end"
                except (TimeoutError, ChildProcessError, CheckpointError, OSError) as error:
                    kept.append(False)
                    fault = f"{type(error).__name__}: {error}"
                seconds = round(time.monotonic() - started, 1)
                runs.append({"harm": harm, "as promised": kept[-1], "seconds": seconds, "fault": fault})
                print(f"{'as promised' if kept[-1] else 'NOT as promised'}, {seconds} s: {harm}", fault, flush=True)
                if not kept[-1]:
                    for machine in lab.machines:
                        print(f"{machine.name}:\n{machine.output.read_text()[-6000:]}", flush=True)
            rows.append((harm, times, sum(kept), promise))
        lab.begin()
    if only:
        return
    total = sum(row[1] for row in rows)
    report(
        "machines",
        ("what was done", "times", "as promised", "promised"),
        [*rows, ("all", total, sum(row[2] for row in rows), "")],
        runs,
        patience_in_seconds=PATIENCE,
        largest_relative_difference_of_a_loss_to_one_process=distance["loss"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only trials whose function is named so")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)  # where `ip netns` keeps names
        experiment(arguments.only)
        return
    apart = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    apart += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        subprocess.run([*apart, "ip", "link", "add", "x", "type", "veth"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped: this needs Linux, iproute2, and the right to make network namespaces ({error})")
        return
    command = [*apart, sys.executable, __file__, "--inside", *(("--only", *arguments.only) if arguments.only else ())]
    sys.exit(subprocess.run(command, check=False, timeout=3600).returncode)


if __name__ == "__main__":
    main()
