"""Fault injection: kills training processes and damages their files, at random; the outcomes stand in docs/training.md.

`python benchmarks/fault_injection.py` kills 50 trainings, and damages last.pt and model.pt a thousand times each.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPOSITORY, end_of, report, same
from tqdm.auto import tqdm

from machinery import checkpoint
from model import Net, WeightsError
from train import CheckpointError

# A checkpoint after every step, so that some kills fall into the writing of one.
TRAINING = """
import sys
from dataset import CIFAR10, DEFAULT_AUGMENT
from train import Config, fit, resumed
if __name__ == "__main__":
    train_set = CIFAR10(data="synthetic").subset(range(200), augment=DEFAULT_AUGMENT)
    test_set = CIFAR10(train=False, data="synthetic").subset(range(50))
    name, action = sys.argv[1:]
    new = Config(data="synthetic", name=name, epochs=2, batch_size=20, workers=1, save_minutes=0)
    config = resumed(f"runs/{name}") if action == "resume" else new
    fit(config, train_set=train_set, test_set=test_set, progress=False)
"""


def kill_and_resume(kills: int, folder: Path, dice: random.Random) -> Counter:
    """Trains once undisturbed, then with a SIGKILL at a random instant each, and compares each end with the first."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(name: str, action: str = "start") -> subprocess.Popen:
        command = [sys.executable, "-c", TRAINING, name, action]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    began = time.perf_counter()
    if start("undisturbed").wait() != 0:
        raise RuntimeError("the undisturbed run failed")
    duration, expected = time.perf_counter() - began, end_of(folder / "runs/undisturbed")
    counts: Counter = Counter()
    for k in tqdm(range(kills), desc="kills"):
        run = folder / "runs" / f"killed{k}"
        process = start(run.name)
        time.sleep(dice.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts["killed while a checkpoint was written"] += any(run.glob(".last.pt*"))
        saved = (run / "last.pt").exists()
        counts["killed before the first checkpoint"] += not saved
        start(run.name, "resume" if saved else "start").wait()
        with contextlib.suppress(CheckpointError, WeightsError):
            is_same = same(end_of(run), expected) and same(weights_in(run / "model.pt"), expected["model"])
            counts["ended as an undisturbed run, bit for bit"] += is_same
        shutil.rmtree(run, ignore_errors=True)
    return counts


def weights_in(path: Path) -> dict[str, Any]:
    return Net.from_pretrained(path).state_dict()


def damage(times: int, path: Path, read: Callable[[], Any], dice: random.Random) -> Counter:
    """Damages the file anew each time, and reads it."""
    good, expected, counts = path.read_bytes(), read(), Counter[str]()
    for _ in tqdm(range(times), desc=path.name):
        path.write_bytes(damaged(good, dice))
        try:
            counts["read as it was" if same(read(), expected) else "read as another"] += 1
        except (CheckpointError, WeightsError) as error:
            counts["refused by name" if path.name in str(error) else "refused without a name"] += 1
        except Exception:
            counts["ended in another error"] += 1
    return counts


def damaged(content: bytes, dice: random.Random) -> bytes:
    """With a bit flipped, the end cut off, or two pieces swapped; never the same as before."""
    bad = bytearray(content)
    while bad == content:
        kind = dice.choice(("flip", "truncate", "swap"))
        if kind == "flip":
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        elif kind == "truncate":
            del bad[dice.randrange(len(bad)) :]
        else:
            i, j = dice.sample(range(0, len(bad) - 16, 16), 2)
            bad[i : i + 16], bad[j : j + 16] = bad[j : j + 16], bad[i : i + 16]
    return bytes(bad)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=1000)
    options = parser.parse_args(arguments)
    dice, harm = random.Random(0), "bits flipped, the end cut off, pieces swapped"
    with tempfile.TemporaryDirectory() as name:
        killed = kill_and_resume(options.kills, Path(name), dice)
        last, model = (Path(name, "runs/undisturbed", file) for file in ("last.pt", "model.pt"))
        found = (
            ("SIGKILL at a random instant, then resumed", options.kills, killed),
            (f"last.pt: {harm}", options.damages, damage(options.damages, last, lambda: checkpoint.load(last), dice)),
            (f"model.pt: {harm}", options.damages, damage(options.damages, model, lambda: weights_in(model), dice)),
        )
    rows = [(fault, n, ", ".join(f"{c:,} {what}" for what, c in counts.items())) for fault, n, counts in found]
    report("fault_injection", ("fault", "times", "outcome"), rows)


if __name__ == "__main__":
    main()
