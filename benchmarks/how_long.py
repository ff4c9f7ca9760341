"""Prints how long training will take here: `python -m benchmarks.how_long -p epochs 20`, as `make run` does first."""

import argparse
import time

import torch

from machinery.data.cifar10 import SYNTHETIC_COUNTS
from machinery.errors import duration
from model import Net
from train import Config, choose_runtime, recipe_optimizer, training_step

IMAGES = 100  # in a timed step, for on a slow CPU a whole batch takes many seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = dict(parser.parse_args().parameter)
    epochs, runtime = int(given.get("epochs", Config.epochs)), choose_runtime()
    counts = SYNTHETIC_COUNTS if given.get("data") == "synthetic" else {True: 50_000, False: 10_000}  # train, test
    model = Net().to(runtime.device)
    optimizer = recipe_optimizer(model)
    step = training_step(model, optimizer, runtime)
    images, labels = runtime.place(torch.rand(IMAGES, 3, 32, 32)), torch.arange(IMAGES, device=runtime.device) % 10
    times = []
    for act in (lambda: step(images, labels)[0].tolist(), optimizer.step) * 2:  # the first round warms up
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    whole, update = times[2:]
    images_seen = counts[True] + counts[False] / 3  # evaluation takes a third of the time
    seconds = images_seen * (whole - update) / IMAGES + counts[True] / Config.batch_size * update
    print(f"training takes about {duration(seconds)} per epoch on this machine ({runtime}),", end=" ")
    print(f"{epochs} epochs about {duration(epochs * seconds)}")


if __name__ == "__main__":
    main()
