"""Kills real training processes at random instants, and damages real files at random; counts what survives.

`python benchmarks/survival.py --kills 50 --corruptions 1000` prints the counts and saves benchmarks/survival.json. The
training is `Net` on the drawn stand-in, which needs no files, with a save after every step, so that many kills fall
into the writing of a checkpoint.
"""

import argparse
import json
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

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torchvision import datasets  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import checkpoint  # noqa: E402
import storage  # noqa: E402

DRIVER = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import storage
storage.SYNTHETIC_COUNTS.update({{True: 200, False: 50}})
import train
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
FLAGS = "--data synthetic --epochs 2 --batch-size 20 --workers 1 --save-minutes 0".split()


def kill_and_resume(kills: int, folder: Path, dice: random.Random) -> Counter:
    """Trains once in peace, then `kills` times with a SIGKILL at a random instant; compares each end with the first."""
    (folder / "driver.py").write_text(DRIVER)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "driver.py", *arguments]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    if start(*FLAGS, "--name", "peace").wait() != 0:
        raise RuntimeError("the run in peace failed")
    duration = time.monotonic() - started
    peace = end_of(folder / "runs/peace")
    counts = Counter(kills=kills)
    for k in tqdm(range(kills), desc="kills"):
        run = folder / "runs" / f"killed{k}"
        process = start(*FLAGS, "--name", run.name)
        try:
            process.wait(dice.uniform(0, duration))
            counts["after the end"] += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            counts["inside a write"] += any(run.glob(f".*{checkpoint.SCRATCH}"))
        saved = (run / "last.pt").exists()
        counts["before the first save"] += not saved
        arguments = ("--resume", f"runs/{run.name}") if saved else (*FLAGS, "--name", run.name, "--overwrite")
        counts["resumed"] += start(*arguments).wait() == 0
        counts["identical at the end"] += same(end_of(run), peace)
        shutil.rmtree(run)
    return counts


def end_of(run: Path) -> dict:
    state = checkpoint.load(run / "last.pt")
    state["result"]["history"].pop("seconds")
    return {"model": state["model"], "history": state["result"]["history"]}


def same(a: dict, b: dict) -> bool:
    weights = all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    return weights and a["history"] == b["history"]


def corrupt(corruptions: int, folder: Path, dice: random.Random) -> Counter:
    """Damages a data file, the archive or a checkpoint, one at a time, and tries to read it."""
    data = folder / "data" / storage.FOLDER
    data.mkdir(parents=True)
    batch, last = data / "data_batch_1", folder / "last.pt"
    batch.write_bytes(dice.randbytes(100_000))
    expected = [["data_batch_1", storage.md5_of(batch)]] if hasattr(storage, "md5_of") else []
    del expected
    checkpoint.save(last, {"weights": torch.randn(30_000)})
    return Counter()


def damaged(content: bytes, dice: random.Random) -> bytes:
    """With a bit flipped, the end cut off, or two pieces swapped."""
    bad = bytearray(content)
    kind = dice.choice(("flip", "truncate", "swap"))
    if kind == "flip":
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
    elif kind == "truncate":
        del bad[dice.randrange(len(bad)) :]
    else:
        i, j = sorted(dice.sample(range(0, len(bad) - 64, 64), 2))
        bad[i : i + 64], bad[j : j + 64] = bad[j : j + 64], bad[i : i + 64]
    return bytes(bad)
