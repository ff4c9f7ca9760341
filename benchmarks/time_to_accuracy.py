"""Accuracy against training time of short runs, beside the original and airbench94_muon; table in docs/speed.md.

`python benchmarks/time_to_accuracy.py` needs CIFAR-10, and about 40 minutes on two cores of a Zen 5.

Runs go to runs/, and are resumed or read if they are there. Up to ten epochs take the settings of the short run, more
(`--epochs 20`) the default ones. Seconds include the waiting for images, not the evaluation. Those of the original are
the time of its training step (32 images, fp32) times its 31,250 steps, those of airbench94_muon that of a step of its
layers (2,000 images, our loop and precision) times its 200.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from baselines import airbench94_muon_network, original_network
from common import SHORT, alternate, as_mean, continued, median_and_half_iqr, one_step, report
from torch.nn import functional as F

from dataset import make_loaders
from model import Net
from train import Config, evaluate, fit, recipe_optimizer

TRAIN_COUNT = 50_000
SHORT_UP_TO = 10  # epochs, in which the network overfits too little to need the whole augmentation
STEPS = {"original": 20 * TRAIN_COUNT // 32, "airbench94_muon": 8 * TRAIN_COUNT // 2000}


def run(epochs: float, seed: int) -> dict[str, float]:
    """Trains, or resumes, and returns how long it took and how accurate it is.

    A part of an epoch is an epoch over that part of the training images.
    """
    left_out = round(max(0, 1 - epochs) * TRAIN_COUNT)
    settings = {"epochs": math.ceil(epochs), "holdout": left_out, **(SHORT if epochs <= SHORT_UP_TO else {})}
    config = continued(Config(name=f"time-{epochs:g}-seed{seed}", seed=seed, **settings))
    torch.manual_seed(seed)
    history = fit(config, model := Net())
    sampler: Any = make_loaders(config)[0].sampler
    passes = sum(sampler.count(epoch) for epoch in range(config.epochs)) / TRAIN_COUNT
    _, test_loader = make_loaders(dataclasses.replace(config, holdout=0))
    plain, averaged = (evaluate(model, test_loader, views=views)[1] for views in (1, 6))
    measured = {"seconds": history["seconds"][-1], "plain": plain, "averaged": averaged}
    return {"epochs": epochs, "seed": seed, "passes": passes, **measured}


def baselines() -> dict[str, Callable[[], Any]]:
    """A training step of the original, and one of airbench94_muon's layers."""
    original, peer = original_network().train(), airbench94_muon_network()
    optimizer = torch.optim.SGD(original.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def original_step() -> None:
        optimizer.zero_grad()
        F.nll_loss(original(images), labels).backward()
        optimizer.step()

    return {"original": original_step, "airbench94_muon": one_step(peer, recipe_optimizer(peer), 2000)}


def row(results: list[dict[str, float]], whole: dict[str, float]) -> tuple:
    """A line of the table, from what `run` returned for each seed, and the seconds of both baselines."""
    of_seeds = {key: [result[key] for result in results] for key in results[0]}
    seconds = statistics.fmean(of_seeds["seconds"])
    return (
        *(f"{results[0]['epochs']:g}", f"{results[0]['passes']:.2g}", len(results)),
        *(as_mean(of_seeds["plain"]), as_mean(of_seeds["averaged"]), as_mean(of_seeds["seconds"], 1)),
        *(f"1/{whole['original'] / seconds:.0f}", f"{seconds / whole['airbench94_muon']:.2f}"),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.4, 0.5, 1, 9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    timed = {name: median_and_half_iqr(seconds) for name, seconds in alternate(baselines(), 20).items()}
    results = [[run(epochs, seed) for seed in options.seeds] for epochs in options.epochs]
    whole = {name: steps * timed[name][0] for name, steps in STEPS.items()}
    columns = "epochs", "passes over the images", "n", "plain %", "6 views %", "seconds"
    report(
        "time_to_accuracy",
        (*columns, "of the original's 20 epochs", "of airbench94_muon's 8 epochs"),
        [row(of_seeds, whole) for of_seeds in results],
        runs=list(itertools.chain(*results)),
        **{f"seconds_of_{name}": round(seconds) for name, seconds in whole.items()},
        **{f"half_iqr_of_{name}": f"{100 * spread / median:.1f} %" for name, (median, spread) in timed.items()},
    )


if __name__ == "__main__":
    main()
