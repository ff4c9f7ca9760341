"""Does harm to trainings on two machines, and counts how they end: `make machines`, or `python benchmarks/machines.py`.

The machines are those of `laboratory.py`; where they cannot be made, it says so and does nothing. Prints a table and
saves it in benchmarks/machines.json.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import report
from laboratory import FLAGS, LIMIT, PATIENCE, REPOSITORY, Laboratory, inside
from survival import end_of

from machinery.errors import CheckpointError

TOTAL_LIMIT = 3600  # seconds for everything
PEACE = "ended with the weights, to the last bit, of a run in peace"
GO_ON = "ended with a sentence; last.pt was whole, and went on to the weights of a run in peace"
REFUSED = "refused before any work, on both machines, in a sentence that names it"


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
    lab.wait(lambda: not any(machine.trainers() for machine in lab.machines))
    lab.wire.cut = False  # torchrun of the machine that is cut off waits for it, or for TCP to give up
    statuses = lab.ends()
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
    own = lab.made(lab.folder.parent / f"own-{lab.number}")
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
    return ended and counts == [1, 0, 1] and distance["loss"] < 1e-3 and distance["accuracy"] <= 3


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


def experiment(only: list[str], once: bool) -> int:
    """Returns the exit status: 0 if all ended as promised."""
    lab = Laboratory()
    lab.measure_peace()
    distance = apart(lab.peace["history"], lab.alone["history"])
    if distance["loss"] > 1e-3:
        raise RuntimeError(f"two machines do not learn what one process learns: {distance}")
    print(f"in peace, two machines and one process: {distance}", flush=True)
    rows, runs = [], []
    for harm, times, trial, promise in TRIALS:
        if only and not any(word in trial.__name__ for word in only):
            continue
        kept = []
        for _ in range(1 if once else times):
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
        rows.append((harm, len(kept), sum(kept), promise))
    lab.begin()
    failed = sum(not run["as promised"] for run in runs)
    if only or once:
        return int(failed > 0)
    total = sum(row[1] for row in rows)
    report(
        "machines",
        ("what was done", "times", "as promised", "promised"),
        [*rows, ("all", total, sum(row[2] for row in rows), "")],
        runs,
        patience_in_seconds=PATIENCE,
        largest_relative_difference_of_a_loss_to_one_process=distance["loss"],
    )
    return int(failed > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only trials whose function is named so")
    parser.add_argument("--once", action="store_true", help="each once, and nothing is saved")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.exit(experiment(arguments.only, arguments.once))
    status = inside(__file__, TOTAL_LIMIT, "--inside", *sys.argv[1:])
    if status is None:
        print("skipped: this needs Linux, iproute2, and the right to make network namespaces")
    sys.exit(status)


if __name__ == "__main__":
    main()
