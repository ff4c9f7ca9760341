"""Kills real training processes at random instants, and damages real files at random; counts what survives.

`python benchmarks/survival.py --kills 50 --corruptions 1000` prints the counts and saves benchmarks/survival.json. The
training is `Net` on synthetic images, which needs no files, with a save after every step, so that some kills fall
into the writing of a checkpoint. What is to be counted 0 times is not, and keeps its earlier counts.
"""

import argparse
import contextlib
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
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import torch  # noqa: E402
from conftest import TinyCIFAR10  # noqa: E402
from torchvision import datasets  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from machinery import checkpoint  # noqa: E402
from machinery.data import cifar10  # noqa: E402
from machinery.errors import CheckpointError, DataError  # noqa: E402
from model import Net, WeightsError  # noqa: E402

DRIVER = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from machinery.data import cifar10
cifar10.SYNTHETIC_COUNTS.update({{True: 200, False: 50}})
import train
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
FLAGS = ["--data", "synthetic", "--epochs", "2", "--batch-size", "20", "--workers", "1", "--save-minutes", "0"]


def kill_and_resume(kills: int, folder: Path, dice: random.Random) -> Counter:
    """Trains once in peace, then `kills` times with a SIGKILL at a random instant; compares each end with the first."""
    (folder / "driver.py").write_text(DRIVER)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "driver.py", *arguments]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    if start(*FLAGS, "--name", "peace").wait() != 0:
        raise RuntimeError("the run in peace failed")
    peace = end_of(folder / "runs/peace")
    counts = Counter(kills=kills)
    for k in tqdm(range(kills), desc="kills"):
        run = folder / "runs" / f"killed{k}"
        process = start(*FLAGS, "--name", run.name)
        for _ in range(dice.randint(0, 15)):  # saves; there are 22
            wait_for_save(run / "last.pt", process)
        time.sleep(dice.uniform(0, 0.3 if run.exists() else 5))
        process.send_signal(signal.SIGKILL)
        counts["ended before"] += process.wait() != -signal.SIGKILL
        counts["inside a write"] += any(run.glob(f".*{checkpoint.SCRATCH}"))
        saved = (run / "last.pt").exists()
        counts["before the first save"] += not saved
        again = start(*(("--resume", f"runs/{run.name}") if saved else (*FLAGS, "--name", run.name)))
        counts["resumed" if saved else "begun anew"] += again.wait() == 0
        with contextlib.suppress(CheckpointError, OSError):
            counts["identical at the end"] += same(end_of(run), peace)
        shutil.rmtree(run)
    return counts


def wait_for_save(path: Path, process: subprocess.Popen) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.001)


def end_of(run: Path) -> dict:
    state = checkpoint.load(run / "last.pt")
    state["result"]["history"].pop("seconds")
    shipped = torch.load(run / "model.pt", weights_only=True)
    return {"model": state["model"], "shipped": shipped, "history": state["result"]["history"]}


def same(a: dict, b: dict) -> bool:
    weights = (torch.equal(a[file][key], b[file][key]) for file in ("model", "shipped") for key in b[file])
    return all(weights) and a["history"] == b["history"]


def corrupt(corruptions: int, folder: Path, dice: random.Random) -> Counter:
    """Damages a data file, the archive or a checkpoint, one at a time, and reads it as a run would."""
    (folder / "data").mkdir()
    tiny = TinyCIFAR10(folder / "data")
    for name, value in tiny.expectations().items():
        setattr(datasets.CIFAR10, name, value)
    last = folder / "last.pt"
    last.write_bytes(checkpoint.packed({"model": Net().state_dict(), "epoch": 3}))
    by_hand = folder / "by-hand"
    by_hand.mkdir()
    shutil.copy(tiny.archive, by_hand)
    readers: dict[Path, Callable[[], object]] = {
        **{path: lambda: cifar10.prepare(tiny.root) for path in (tiny.root / cifar10.FOLDER).iterdir()},
        by_hand / cifar10.ARCHIVE: lambda: cifar10.prepare(by_hand),
        last: lambda: checkpoint.load(last),
    }
    counts = Counter(corruptions=corruptions)
    for _ in tqdm(range(corruptions), desc="corruptions"):
        path = dice.choice(list(readers))
        good = path.read_bytes()
        path.write_bytes(damaged(good, dice))
        try:
            readers[path]()
            counts["accepted"] += 1
        except (DataError, CheckpointError) as error:
            counts["refused by name" if path.name in str(error) else "refused"] += 1
        except Exception:
            counts["another error"] += 1
        path.write_bytes(good)
    for read in readers.values():
        read()  # undamaged, all are accepted
    return counts


def corrupt_weights(corruptions: int, folder: Path, dice: random.Random) -> Counter:
    """Damages a file of weights, and reads it as `Net.from_pretrained` and `--weights` do."""
    path = folder / "model.pt"
    torch.save(Net().state_dict(), path)
    good, whole = path.read_bytes(), Net.from_pretrained(path).state_dict()
    counts = Counter(corruptions=corruptions)
    for _ in tqdm(range(corruptions), desc="weights"):
        path.write_bytes(damaged(good, dice))
        try:
            read = Net.from_pretrained(path).state_dict()
            counts["unharmed" if all(torch.equal(read[name], whole[name]) for name in whole) else "believed"] += 1
        except WeightsError:
            counts["refused"] += 1
        except Exception:
            counts["another error"] += 1
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    saved, dice = Path(__file__).with_suffix(".json"), random.Random(arguments.seed)
    result = json.loads(saved.read_text()) if saved.exists() else {}
    for title, experiment, count in (
        ("kills", kill_and_resume, arguments.kills),
        ("corruptions", corrupt, arguments.corruptions),
        ("weights", corrupt_weights, arguments.corruptions),
    ):
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result[title] = experiment(count, Path(folder), dice)
        print(title, dict(result[title]), flush=True)
    saved.write_text(json.dumps({**result, "seed": arguments.seed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
