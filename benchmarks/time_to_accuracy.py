"""Accuracy against training time: short and long runs of the one recipe, beside the original's 20 epochs.

`python benchmarks/time_to_accuracy.py --epochs 1 8 20 --seeds 0 1 2` trains, from CIFAR-10 (see the README), a run for
each number of epochs and each seed, saved in runs/ and not repeated when it is there already, then prints a table.
Training time is that of the training steps, without evaluation. The time of the original is its measured time for a
step, with its batch size, precision and layout, times its 31,250 steps.

Averaged accuracy is that of six views, as in airbench (K. Jordan, 2024): the image, moved by a pixel up and left, and
down and right, with weights 1/2, 1/4, 1/4, each with its mirror image. Plain accuracy comes first everywhere.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import alternate, largest_convolution, middle, report
from original import original_network
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config, choose_runtime
from model import Net
from train import fit, make_loaders

ORIGINAL_STEPS = 20 * 50_000 // 32


def six_views(model: nn.Module, images: Tensor) -> Tensor:
    """Averaged log-probabilities (N, classes) of images (N, 3, 32, 32)."""
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    views = [(images, 0.5), (padded[:, :, :32, :32], 0.25), (padded[:, :, 2:, 2:], 0.25)]
    return sum(weight * (model(view) + model(view.flip(3))) / 2 for view, weight in views)


@torch.no_grad()
def averaged_accuracy(model: nn.Module, config: Config) -> float:
    """In percent, of the test set."""
    runtime = choose_runtime()
    correct = count = 0
    for images, labels in make_loaders(config)[1]:
        with runtime.autocast():
            correct += (six_views(model.eval(), runtime.place(images)).argmax(1) == labels).sum().item()
        count += len(labels)
    return 100 * correct / count


def run(epochs: int, seed: int) -> dict[str, float]:
    """Trains, unless runs/ has it, and says how long it took and how good it is."""
    name = f"time-{epochs}-seed{seed}"
    config = Config(epochs=epochs, seed=seed, name=name)
    folder = Path("runs", name)
    if not (folder / "last.pt").exists():
        fit(config)
    elif len(json.loads((folder / "metrics.json").read_text())["history"]["epoch"]) < epochs:
        fit(Config(epochs=epochs, seed=seed, resume=str(folder)))
    history = json.loads((folder / "metrics.json").read_text())["history"]
    model = Net().to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return {
        "seconds": history["seconds"][-1],
        "plain": history["test_accuracy"][-1],
        "averaged": averaged_accuracy(model, config),
    }


def original_seconds() -> tuple[float, float]:
    """Of the original's 20 epochs of training steps here, and the rate of a large bf16 convolution in GFLOP/s."""
    model = original_network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    convolution, operations = largest_convolution()

    def step() -> None:
        optimizer.zero_grad()
        F.nll_loss(model(images), labels).backward()
        optimizer.step()

    seconds = alternate({"original": step, "limit": convolution}, 15)
    return ORIGINAL_STEPS * middle(seconds["original"])[0], operations / middle(seconds["limit"])[0] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, Config().epochs, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    original, limit = original_seconds()
    rows = []
    for epochs in arguments.epochs:
        results = [run(epochs, seed) for seed in arguments.seeds]
        columns = {key: [result[key] for result in results] for key in results[0]}
        mean = {key: statistics.fmean(values) for key, values in columns.items()}
        spread = {key: statistics.stdev(values) if len(values) > 1 else 0.0 for key, values in columns.items()}
        texts = [f"{mean[key]:.2f} ± {spread[key]:.2f}" for key in ("plain", "averaged")]
        seconds = mean["seconds"]
        at_425 = seconds * limit / 425
        rows.append((epochs, len(results), *texts, round(seconds), round(at_425), f"{original / seconds:.0f}"))
    report(
        "time_to_accuracy",
        ("epochs", "n", "plain %", "6 views %", "seconds", "seconds at 425 GFLOP/s", "times faster than the original"),
        rows,
        original_seconds_for_20_epochs=round(original),
        limit_gflops=round(limit),
    )


if __name__ == "__main__":
    main()
