"""Accuracy against training time: short runs beside the original and airbench94_muon.

`python benchmarks/time_to_accuracy.py` trains, from CIFAR-10 (see the README), a run for each number of epochs and each
seed, about 40 minutes on two cores of the Zen 5, saved in runs/ and not repeated when it is there already, then
prints a table. Runs of up to ten epochs are trained by the settings that suit short ones, others (`--epochs 20`) by the
default settings. Training time is that of the training steps with the waiting for images, without evaluation. The time
of the original is that of a step on this machine, on one batch, with its batch size, precision and layout, times its
31,250 steps; that of airbench94_muon is that of a step of its layers in our loop, on one batch of its 2,000 images,
with our precision and layout, times its 200 steps. Both, and one large convolution, are timed before each number of
epochs and after the last; the medians count. So compare in one go: runs of another day, taken up from runs/, had a
machine that may have been faster or slower. Since airbench94_muon took 1,136 s where a large convolution reaches 425
GFLOP/s, seconds are also given in proportion to that: as they would be there if all work were as much slower as
convolutions.

Averaged accuracy is that of six views, as in airbench (K. Jordan, 2024): the image, moved by a pixel up and left, and
down and right, with weights 1/2, 1/4, 1/4, each with its mirror image. Plain accuracy comes first everywhere.
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
from common import alternate, as_mean, largest_convolution, median_and_half_iqr, report, taken_up, training_step
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import make_loaders
from machinery.data.sampler import EpochSampler
from model import Net
from train import Config, evaluate, fit, recipe_optimizer

TRAIN_COUNT = 50_000
ORIGINAL_STEPS = 20 * TRAIN_COUNT // 32
PEER_BATCH = 2000
PEER_STEPS = 8 * TRAIN_COUNT // PEER_BATCH
SHORT = 10  # up to so many epochs, the network fits too little to bear the whole augmentation, and skips what it knows
SHORT_SETTINGS: dict[str, Any] = {"augment": ("crop", "flip"), "padding": 2, "skip": 0.6}


class SixViews(nn.Module):
    """Averages the log-probabilities (N, classes) that `model` gives for six views of images (N, 3, 32, 32)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        views = [(images, 0.5), (padded[:, :, :32, :32], 0.25), (padded[:, :, 2:, 2:], 0.25)]
        return sum(weight * (self.model(view) + self.model(view.flip(3))) / 2 for view, weight in views)


def run(epochs: float, seed: int) -> dict[str, float]:
    """Trains, or takes up what runs/ has of it, and says how long it took and how good it is.

    A part of an epoch is an epoch over that part of the training images.
    """
    settings = SHORT_SETTINGS if epochs <= SHORT else {}
    name = f"time-{epochs:g}-seed{seed}"
    left_out = round(max(0, 1 - epochs) * TRAIN_COUNT)
    config = taken_up(Config(epochs=math.ceil(epochs), holdout=left_out, seed=seed, name=name, **settings))
    torch.manual_seed(seed)
    history = fit(config, model := Net())
    _, test_loader = make_loaders(dataclasses.replace(config, holdout=0))
    sampler = EpochSampler(TRAIN_COUNT - left_out, skip=config.skip, epochs=config.epochs)
    passes = sum(sampler.count(epoch) for epoch in range(config.epochs)) / TRAIN_COUNT
    plain, averaged = (evaluate(network, test_loader)[1] for network in (model, SixViews(model)))
    measured = {"seconds": history["seconds"][-1], "plain": plain, "averaged": averaged}
    return {"epochs": epochs, "seed": seed, "passes": passes, **measured}


def baselines() -> tuple[dict[str, Callable[[], Any]], float]:
    """A step of the original, one of airbench94_muon's layers, and a large convolution, with the operations of that."""
    original = original_network().train()
    optimizer = torch.optim.SGD(original.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    convolution, operations = largest_convolution()

    def original_step() -> None:
        optimizer.zero_grad()
        F.nll_loss(original(images), labels).backward()
        optimizer.step()

    peer = airbench94_muon_network()
    peer_step = training_step(peer, recipe_optimizer(peer), PEER_BATCH)
    return {"original": original_step, "peer": peer_step, "limit": convolution}, operations


def row(results: list[dict[str, float]], original: float, peer: float, limit: float) -> tuple:
    """A line of the table, from what `run` returned for each seed, the seconds of both baselines, and GFLOP/s."""
    of_seeds = {key: [result[key] for result in results] for key in results[0]}
    seconds = statistics.fmean(of_seeds["seconds"])
    return (
        *(f"{results[0]['epochs']:g}", f"{results[0]['passes']:.2g}", len(results)),
        *(as_mean(of_seeds["plain"]), as_mean(of_seeds["averaged"]), as_mean(of_seeds["seconds"], 1)),
        *(round(seconds * limit / 425), f"1/{original / seconds:.0f}", f"{seconds / peer:.2f}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.4, 0.5, 1, 9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if not all(0.2 <= epochs < 1 or (epochs >= 1 and epochs % 1 == 0) for epochs in arguments.epochs):
        parser.error("epochs are whole, or a part of one, at least a fifth")
    candidates, operations = baselines()
    timings, results = [], []
    for epochs in arguments.epochs:
        timings.append(alternate(candidates, 5))
        results.append([run(epochs, seed) for seed in arguments.seeds])
    timings.append(alternate(candidates, 5))
    timed = {name: median_and_half_iqr(itertools.chain(*(seconds[name] for seconds in timings))) for name in candidates}
    spread = {name: f"{100 * half_iqr / median:.1f} %" for name, (median, half_iqr) in timed.items()}
    original, peer = ORIGINAL_STEPS * timed["original"][0], PEER_STEPS * timed["peer"][0]
    limit = operations / timed["limit"][0] / 1e9
    report(
        "time_to_accuracy",
        (
            *("epochs", "passes over the images", "n", "plain %", "6 views %", "seconds", "seconds at 425 GFLOP/s"),
            *("of the original's 20 epochs", "of airbench94_muon's 8 epochs"),
        ),
        [row(of_seeds, original, peer, limit) for of_seeds in results],
        list(itertools.chain(*results)),
        seconds_of_the_original=round(original),
        seconds_of_airbench94_muon=round(peer),
        gflops_of_one_large_convolution=round(limit),
        half_iqr_of_the_original=spread["original"],
        half_iqr_of_airbench94_muon=spread["peer"],
        half_iqr_of_the_convolution=spread["limit"],
    )


if __name__ == "__main__":
    main()
