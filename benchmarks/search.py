"""Trains candidates on 45,000 training images and tests them on the other 5,000, as long as there is time.

`python benchmarks/search.py --minutes 6` gives each candidate a run, then each a second one with another seed, and so
on, and saves benchmarks/search.json after each: accuracies, their mean and the standard error of it. On a GPU, a run of
20 epochs takes about 15 s; on two CPU cores, an hour. `--candidates NAME ...` chooses among them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import taken_up
from mirrored import MirroredNet
from torch import nn

from model import Net
from train import Config, describe_hardware, fit

SAVED = Path(__file__).with_suffix(".json")
Candidate = tuple[type[nn.Module], dict[str, Any]]
CANDIDATES: dict[str, Candidate] = {  # the network, and the settings that are not the default ones
    "net": (Net, {}),
    "mirrored": (MirroredNet, {}),
    "mirrored, smoothing 0.1": (MirroredNet, {"label_smoothing": 0.1}),
    "mirrored, CutMix 0.25": (MirroredNet, {"cutmix": 0.25}),
    "mirrored, CutMix 0.25, smoothing 0.1": (MirroredNet, {"cutmix": 0.25, "label_smoothing": 0.1}),
    "mirrored, lr 0.16": (MirroredNet, {"lr": 0.16}),
    "mirrored, lr 0.09": (MirroredNet, {"lr": 0.09}),
    "mirrored, batch 250, lr 0.09": (MirroredNet, {"batch_size": 250, "lr": 0.09}),
    "mirrored, trivial": (MirroredNet, {"augment": ("crop", "flip", "trivial", "cutout")}),
}


def run(name: str, seed: int, epochs: int, holdout: int) -> dict[str, float]:
    """Trains a candidate, or takes up what runs/ has of it: accuracy and loss on the held-out images, and seconds."""
    network, settings = CANDIDATES[name]
    folder = f"search-{epochs}-{name.replace(', ', '-').replace(' ', '')}-seed{seed}"
    config = taken_up(Config(name=folder, epochs=epochs, holdout=holdout, seed=seed, **settings))
    torch.manual_seed(seed)
    history = fit(config, network())
    last = {column: history[column][-1] for column in ("test_accuracy", "test_loss", "train_accuracy", "seconds")}
    return {"seed": seed, **last}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean accuracy in percent, and the standard error of it, for which two runs are needed."""
    accuracies = [run["test_accuracy"] for run in runs]
    error = statistics.stdev(accuracies) / len(runs) ** 0.5 if len(runs) > 1 else float("nan")
    return {"n": len(runs), "mean": round(statistics.fmean(accuracies), 2), "standard_error": round(error, 2)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="begin no run after this time (default: 6)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--holdout", type=int, default=5000)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    options = parser.parse_args(arguments)
    started, runs = time.monotonic(), {name: [] for name in options.candidates}  # type: ignore[var-annotated]
    for turn in range(100 * len(runs)):
        seed, k = divmod(turn, len(runs))
        if time.monotonic() - started > 60 * options.minutes:
            break
        name = options.candidates[k]
        runs[name].append(run(name, seed, options.epochs, options.holdout))
        print(f"{name}: {summary(runs[name])}", flush=True)
        result = {
            "hardware": describe_hardware(),
            "torch": torch.__version__,
            "epochs": options.epochs,
            "holdout": options.holdout,
            "candidates": {name: {**summary(done), "runs": done} for name, done in runs.items() if done},
        }
        SAVED.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
