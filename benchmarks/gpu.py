"""Whether training on a GPU is right, how fast it is, and what it takes; in five parts.

`python benchmarks/gpu.py` needs CIFAR-10 (see the README) and is made for nine minutes on one H100. When they are
nearly over, no further training of parts 3 to 5 begins, so on a slower card n may be smaller. All that is there is
saved in benchmarks/gpu.json as it comes, so that a cut loses nothing; `--parts 3 4` runs these alone and keeps what the
file has of the others:

1. checks, on a tenth of the images: the device makes and computes what the CPU does, and repeats itself
2. step: a training step and its layers beside one large convolution and airbench94_muon's layers, loader included
3. short: accuracy and time of the short run, which is made for 94 % with 6 views
4. default: the same of the default settings
5. memory: at its peak

Seconds are read when the GPU has done all that was begun. The first training of a process is slower, since libraries
are loaded and memory is taken, so an epoch goes before everything and does not count. All trainings write to
runs/benchmark-gpu, which is deleted in the end. `--quick` tries the script with a narrow network on a few drawn images,
on the CPU if there is no GPU, and saves runs/gpu_quick.json.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, as_mean, multiply_adds, result_of, save, show
from gpu_checks import NEEDS_GPU, checks, machine
from gpu_step import step
from growth import widened
from time_to_accuracy import SHORT_SETTINGS
from torch import nn

from dataset import CIFAR10, Images
from machinery.data.loader import DeviceLoader
from machinery.data.sampler import EpochSampler
from model import Net
from train import Config, StoppedError, choose_runtime, describe_hardware, evaluate, fit

NAME = "benchmark-gpu"  # of the folder in runs/


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    train_set: int = 50_000  # images; a fifth as many are tested on
    checked: int = 5_000  # of a training that is a check
    batch_size: int = Config().batch_size
    rounds: int = 15
    repeats: int = 10  # of a step or layer in a round; in the first, uncounted one it is captured as a graph
    short: int = 9  # epochs
    default: int = Config().epochs
    runs: int = 5
    width: float = 1  # of `Net`


QUICK = Size(20, 20, batch_size=5, rounds=2, repeats=1, short=3, default=1, runs=2, width=0.1)


class Bench:
    """The device, the images, and how a network is trained on them."""

    def __init__(self, quick: bool, data_dir: str | None, minutes: float) -> None:
        self.started, self.limit, self.size = time.perf_counter(), 60 * minutes, QUICK if quick else Size()
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:  # else `use_deterministic_algorithms` warns of every matrix product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        elif quick:
            torch.set_num_threads(1)  # several would mostly wait for each other
        self.runtime = choose_runtime("cuda" if self.on_gpu else "cpu")
        data = "synthetic" if quick else "cifar10"
        self.train_set, self.test_set = (CIFAR10(data_dir, train, data=data) for train in (True, False))
        self.test_loader = DeviceLoader(self.test_images(), 500, range(self.size.train_set // 5), self.runtime.device)
        self.first = math.nan  # seconds of `warm_up`

    def warm_up(self) -> None:
        """An epoch that does not count."""
        began = self.now()
        self.fitted(self.config(epochs=1), self.size.train_set)
        self.first = self.now() - began

    def now(self) -> float:
        """Seconds since the start, when all is done that was begun."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - self.started

    def config(self, **settings: Any) -> Config:
        always = {"name": NAME, "overwrite": True, "device": self.runtime.device.type, "workers": 0}
        return Config(**{**always, "batch_size": self.size.batch_size, **settings})

    def images(self, config: Config, count: int) -> Images:
        """The first `count` training images, augmented as these settings say."""
        self.train_set.seed, self.train_set.padding = config.seed, config.padding
        return self.train_set.subset(range(count), config.augment)

    def test_images(self, count: int | None = None) -> Images:
        """What goes with the first `count` training images, by default all of them."""
        return self.test_set.subset(range((count or self.size.train_set) // 5))

    def net(self, seed: int = 0) -> nn.Module:
        """A `Net` with the first weights of this seed."""
        torch.manual_seed(seed)
        return Net() if self.size.width == 1 else widened(Net(), self.size.width)

    def fitted(
        self, config: Config, count: int, net: nn.Module | None = None, **options: Any
    ) -> tuple[nn.Module, dict[str, list]]:
        """A network trained on so many images, and its history."""
        net = net or self.net(config.seed)
        if self.on_gpu:
            gc.collect()  # what is left of other trainings, and not while a graph is captured
        sets: dict[str, Any] = {"train_set": self.images(config, count), "test_set": self.test_images(count)}
        with contextlib.redirect_stdout(io.StringIO()):
            return net, fit(config, net, **sets, progress=False, **options)


def trainings(bench: Bench, epochs: int, **settings: Any) -> Iterator[dict[str, Any]]:
    """One for each seed, as long as there is time."""
    size, sampler = bench.size, EpochSampler(bench.size.train_set, skip=settings.get("skip", 0), epochs=epochs)
    images = sum(sampler.count(epoch) for epoch in range(epochs))
    passes = images / size.train_set
    petaflop = 3 * 2 * multiply_adds(bench.net()) * images / 1e15  # forward, and backward to input and to weights
    runs: list[dict[str, float]] = []
    for seed in range(size.runs):
        began = bench.now()
        if began + max((run["seconds_in_all"] for run in runs), default=passes * bench.first) > bench.limit:
            print(f"no time for seed {seed}", flush=True)
            return
        net, history = bench.fitted(bench.config(epochs=epochs, seed=seed, **settings), size.train_set)
        ended = bench.now()
        _, averaged = evaluate(net, bench.test_loader, views=6)
        measured = {"plain": history["test_accuracy"][-1], "averaged": averaged, "loss": history["test_loss"][-1]}
        measured |= {"seconds": history["seconds"][-1], "seconds_in_all": ended - began}
        measured |= {"seconds_of_6_views": bench.now() - ended}
        runs.append({"seed": seed, **measured})
        print(", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in runs[-1].items()), flush=True)
        columns = {key: [run[key] for run in runs] for key in measured}
        means = [as_mean(columns[key]) for key in ("plain", "averaged", "seconds", "seconds_in_all")]
        rate = round(1000 * petaflop / statistics.fmean(columns["seconds"]), 1)
        yield result_of(
            ("epochs", "passes", "n", "plain %", "6 views %", "seconds of training", "in all", "PFLOP", "TFLOP/s"),
            [(epochs, passes, len(runs), *means, petaflop, rate)],
            runs,
            seconds_of_testing_with_6_views=round(statistics.median(columns["seconds_of_6_views"]), 2),
            seconds_of_an_epoch_before_everything=round(bench.first, 1),
        )


def memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """Of training with several batch sizes, the images on the GPU included."""
    rows: list[tuple] = []
    for batch_size in (bench.size.batch_size, 2 * bench.size.batch_size, 4 * bench.size.batch_size):
        if bench.now() > bench.limit:
            print(f"no time for batches of {batch_size}", flush=True)
            return
        peaks: tuple = (NEEDS_GPU, NEEDS_GPU)
        if bench.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            bench.fitted(bench.config(epochs=1, batch_size=batch_size), bench.size.train_set)
            peaks = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
        rows.append((batch_size, *peaks))
        yield result_of(("batch size", "GB of tensors at the peak", "GB that PyTorch took from the GPU"), rows)


PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "checks": checks,
    "step": step,
    "short": lambda bench: trainings(bench, bench.size.short, **SHORT_SETTINGS),
    "default": lambda bench: trainings(bench, bench.size.default),
    "memory": memory,
}


@contextlib.contextmanager
def printed(errors: list[Exception]) -> Iterator[None]:
    """Prints and collects what goes wrong inside, for the other parts are worth having."""
    try:
        yield
    except StoppedError:
        shutil.rmtree(Path("runs", NAME), ignore_errors=True)
        sys.exit("stopped")
    except Exception as error:
        traceback.print_exc()
        errors.append(error)


def main(arguments: list[str] | None = None) -> int:
    """Returns how many parts ended in an error, and checks in something else than they should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = range(1, len(PARTS) + 1)
    parser.add_argument("--parts", type=int, nargs="+", choices=numbers, metavar="N", help="only these, 1 to 5")
    parser.add_argument("--quick", action="store_true", help="try the script on a few drawn images")
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-10 is, as for train.py")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no training begins (default: 8.5)")
    parser.add_argument("--save-to", type=Path, metavar="FILE", help="(default: benchmarks/gpu.json)")
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --quick tries the script without one")
    path = options.save_to or (Path("runs/gpu_quick.json") if options.quick else FOLDER / "gpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    bench = Bench(options.quick, options.data_dir, options.minutes)
    versions = {"torch": torch.__version__, **machine()}
    print("; ".join([describe_hardware(), *(f"{k.replace('_', ' ')}: {v}" for k, v in versions.items())]), flush=True)
    errors: list[Exception] = []
    measured: set[str] = set()
    with printed(errors):
        bench.warm_up()
    for number, (name, part) in zip(numbers, PARTS.items(), strict=True):
        if options.parts and number not in options.parts:
            continue
        print(f"\n{number}. {name}", flush=True)
        with printed(errors):
            for result in part(bench):
                results[name] = result
                measured.add(name)
                save(results, path)
        if name in measured:
            show(results[name])
        print(f"{time.perf_counter() - bench.started:.0f} s since the start; saved in {path}", flush=True)
    shutil.rmtree(Path("runs", NAME), ignore_errors=True)
    if kept := [name for name in results if name not in measured]:
        print(f"kept in {path} from earlier: {', '.join(kept)}")
    rows = results["checks"]["rows"] if "checks" in measured else []
    if wrong := [row["check"] for row in rows if row["as it should be"] == "no"]:
        print(f"not as it should be: {'; '.join(wrong)}")
    return len(errors) + len(wrong)


if __name__ == "__main__":
    sys.exit(main())
