"""Whether training on an NVIDIA GPU is right, and how fast it is.

`python benchmarks/gpu.py` needs CIFAR-10; `--images 40` tries it on few images, on the CPU.

First come the trainings that matter, the default recipe and the short run, three times each; then others, then checks.
Each is saved in benchmarks/gpu.json at once. One epoch goes before everything, uncounted: it loads libraries.
"""

import argparse
import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, SHORT, as_mean, as_page, result_of, save
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from dataset import CIFAR10, denormalize, make_loaders
from model import Net
from train import Config, StoppedError, choose_runtime, evaluate, fit, resumed, train_one_epoch

NAME = "benchmark-gpu"  # of the folder in runs/
TRIVIAL = ("crop", "flip", "trivial", "cutout")
RECIPES: dict[str, dict[str, Any]] = {
    "default recipe": {"epochs": 20},
    "short run": {"epochs": 9, **SHORT},
    "default recipe, eager steps": {"epochs": 3, "graphs": "off"},
    "trivial, images from workers": {"epochs": 3, "augment": TRIVIAL},
}
TRAININGS = [*((name, seed) for seed in range(3) for name in [*RECIPES][:2]), *((name, 0) for name in [*RECIPES][2:])]
EPOCHS = 3  # of a check
FEW = 4_900  # images of a check, which leave a smaller last batch
ALLOWED = 0.1  # how far weights may end apart, as a share of the way that they went: bf16 sums round in another order


class Bench:
    """What to train on: CIFAR-10, or for a trial a few synthetic images; a fifth as many are tested on."""

    def __init__(self, trial_images: int | None = None) -> None:
        self.images, self.is_trial = trial_images or 50_000, bool(trial_images)
        data = "synthetic" if self.is_trial else "cifar10"
        self.settings: dict[str, Any] = {"name": NAME, "overwrite": True, "data": data}
        self.settings |= {"batch_size": self.images // 5} if self.is_trial else {}
        self.whole = CIFAR10(data=data), CIFAR10(train=False, data=data)
        self.device = choose_runtime().device

    def config(self, **settings: Any) -> Config:
        return Config(**{**self.settings, **settings})

    def sets(self, config: Config) -> dict[str, Any]:
        """Training and test images, as `fit` and `make_loaders` take them."""
        train_set = self.whole[0].subset(range(self.images), config.augment)
        train_set.padding = config.padding
        return {"train_set": train_set, "test_set": self.whole[1].subset(range(self.images // 5))}

    def loaders(self, config: Config, device: torch.device | None) -> Any:
        return make_loaders(config, device, **self.sets(config))

    def fitted(self, net: nn.Module, config: Config, **options: Any) -> dict[str, list]:
        with contextlib.redirect_stdout(io.StringIO()):
            return fit(config, net, **self.sets(config), progress=False, **options)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def trained(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """What one training of these settings gave."""
    settings = RECIPES[name] | ({"epochs": 2} if bench.is_trial else {})
    config, net = bench.config(seed=seed, **settings), network(seed)
    began = time.perf_counter()
    history = bench.fitted(net, config)
    whole = time.perf_counter() - began
    _, averaged = evaluate(net, bench.loaders(config, bench.device)[1], views=6)
    measured = {"plain": history["test_accuracy"][-1], "averaged": averaged}
    measured |= {"seconds": history["seconds"][-1], "seconds_in_all": whole}
    return {"recipe": name, "seed": seed, "epochs": config.epochs, **measured}


def table_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for name in dict.fromkeys(run["recipe"] for run in runs):
        of = {key: [run[key] for run in runs if run["recipe"] == name] for key in runs[0]}
        means = (
            as_mean(of["plain"]),
            as_mean(of["averaged"]),
            as_mean(of["seconds"], 1),
            as_mean(of["seconds_in_all"], 1),
        )
        rows.append((name, of["epochs"][0], len(of["seed"]), *means))
    columns = "recipe", "epochs", "n", "plain %", "6 views %", "seconds of training", "seconds in all"
    return result_of(columns, rows, runs=runs)


def fit_once(
    bench: Bench,
    eager: bool,
    dropout: float = 0,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    **settings: Any,
) -> nn.Module:
    """A network after `fit`, with dropout, an optimizer or a scheduler of one's own."""
    config = bench.config(epochs=EPOCHS, **settings, **({"graphs": "off"} if eager else {}))
    net, steps = network(), EPOCHS * -(-bench.images // config.batch_size)
    if dropout:
        net.set_submodule("gap", nn.Sequential(net.get_submodule("gap"), nn.Dropout(dropout)))
    own = optimizer(net) if optimizer else None
    bench.fitted(net, config, optimizer=own, scheduler=scheduler(own, steps) if own and scheduler else None)
    return net


def stopped(bench: Bench, eager: bool) -> nn.Module:
    """As `fit_once`, but, unless `eager`, stopped after the first epoch and resumed."""
    if eager:
        return fit_once(bench, eager)
    with contextlib.suppress(StoppedError):
        bench.fitted(network(), bench.config(epochs=EPOCHS), on_epoch=lambda row: signal.raise_signal(signal.SIGINT))
    bench.fitted(net := network(), resumed(f"runs/{NAME}"))
    return net


def loop(
    bench: Bench,
    eager: bool,
    optimizer: Callable[[nn.Module], Optimizer],
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
) -> nn.Module:
    """A network after as many calls of `train_one_epoch`, or as many epochs of PyTorch's plain loop."""
    net, runtime = network().to(bench.device).train(), choose_runtime()
    loader = bench.loaders(bench.config(), bench.device)[0]
    own = optimizer(net)
    schedule = scheduler(own, EPOCHS * len(loader)) if scheduler else None
    for _ in range(EPOCHS):
        if not eager:
            train_one_epoch(net, loader, own, schedule, progress=False)
        for images, labels in loader if eager else ():
            with runtime.autocast():
                outputs = net(runtime.place(images))
            own.zero_grad()
            F.cross_entropy(outputs.float(), labels.to(runtime.device)).backward()
            own.step()
            if schedule:
                schedule.step()
    return net


class EverySecond(torch.optim.SGD):
    """SGD that accumulates the gradients of two batches."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 2 == 0:
            super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            super().step(closure)


def sgd(net: nn.Module) -> Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)


# Each trains a network; called with True, by eager steps, else as it comes.
CASES: dict[str, Callable[[Bench, bool], nn.Module]] = {
    "fit": fit_once,
    "fit, stopped and resumed": stopped,
    "fit, CutMix": functools.partial(fit_once, cutmix=0.5),
    "fit, fp32": functools.partial(fit_once, precision="fp32"),
    "fit, trivial with two workers": functools.partial(fit_once, augment=TRIVIAL, workers=2),
    "fit, dropout": functools.partial(fit_once, dropout=0.1),
    "fit, SGD and OneCycleLR": functools.partial(fit_once, optimizer=sgd, scheduler=one_cycle),
    "fit, AdamW": functools.partial(fit_once, optimizer=lambda net: torch.optim.AdamW(net.parameters())),
    "train_one_epoch with a scheduler": functools.partial(loop, optimizer=sgd, scheduler=one_cycle),
    "train_one_epoch, accumulation": functools.partial(loop, optimizer=lambda net: EverySecond(net.parameters(), 0.02)),
}


def beside_eager(train: Callable[[Bench, bool], nn.Module], bench: Bench) -> tuple[str, bool]:
    """How far the weights end from those of eager steps, as a share of the way that they went."""
    start, end, expected = (
        torch.cat([p.detach().flatten().double().cpu() for p in net.parameters()])
        for net in (network(), train(bench, False), train(bench, True))
    )
    apart = ((end - expected).norm() / (expected - start).norm()).item()
    return f"{100 * apart:.2g} % apart" if apart else "the same weights, bit for bit", apart < ALLOWED


def images_beside_the_cpu(bench: Bench) -> tuple[str, bool]:
    loaders = [bench.loaders(bench.config(workers=0), device)[0] for device in (bench.device, None)]
    pairs = zip(*(torch.cat([images.cpu() for images, _ in loader]) for loader in loaders), strict=True)
    different = sum(bool((denormalize(a[None]) != denormalize(b[None])).any()) for a, b in pairs)
    return f"{different} images differ", not different


def main(arguments: list[str] | None = None) -> int:
    """Returns how many checks failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, metavar="N", help="try the script on N drawn images, 30 to 2,000")
    options = parser.parse_args(arguments)
    if not options.images and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --images 40 tries the script without one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; the checks are deterministic
    path = Path("gpu_trial.json") if options.images else FOLDER / "gpu.json"
    bench, results, runs, rows = Bench(options.images), {}, [], []

    bench.fitted(network(), bench.config(epochs=1))
    for name, seed in TRAININGS:
        runs.append(trained(bench, name, seed))
        results["trainings"] = table_of(runs)
        save(results, path)
        print(runs[-1], flush=True)

    bench.images = min(bench.images, FEW)
    checks: dict[str, Callable[[Bench], tuple[str, bool]]] = {"images, beside the CPU": images_beside_the_cpu}
    checks |= {name: functools.partial(beside_eager, train) for name, train in CASES.items()}
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, check in checks.items():
        try:
            found, passed = check(bench)
        except (RuntimeError, ValueError, TypeError) as error:  # the other checks are worth having
            found, passed = f"{type(error).__name__}: {error}".splitlines()[0], False
        rows.append((name, found, "yes" if passed else "no"))
        results["checks"] = result_of(("check", "found", "as expected"), rows, images=bench.images)
        save(results, path)
        print(f"{name}: {found}", flush=True)
    torch.use_deterministic_algorithms(False)
    shutil.rmtree(Path("runs", NAME), ignore_errors=True)
    for result in results.values():
        print(as_page(result))
    return sum(row[2] == "no" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
