"""How the training time grows: with the batch size, with the number of images and with the width of the network.

`python benchmarks/growth.py` times training steps on random images, taking turns. Growth with the number of epochs is
that with the number of images, for an epoch is a fixed number of steps.
"""

from typing import Any

import torch
from common import alternate, median_and_half_iqr, report, training_step
from torch import nn

from model import Net
from train import Config, recipe_optimizer

ROUNDS = 9


def widened(model: nn.Module, factor: float) -> nn.Module:
    """`Net` with all channels but the input's and the classes' multiplied, to even numbers."""

    def wide(channels: int) -> int:
        return channels if channels == 3 else 2 * round(channels * factor / 2)

    for name, layer in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        if isinstance(layer, nn.Conv2d):
            groups = wide(layer.groups) if layer.groups > 1 else 1
            options: dict[str, Any] = {"kernel_size": layer.kernel_size, "padding": layer.padding, "bias": False}
            options |= {"dilation": layer.dilation, "groups": groups}
            setattr(parent, attribute, nn.Conv2d(wide(layer.in_channels), wide(layer.out_channels), **options))
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(parent, attribute, nn.BatchNorm2d(wide(layer.num_features)))
        elif isinstance(layer, nn.Linear):
            setattr(parent, attribute, nn.Linear(wide(layer.in_features), layer.out_features, bias=False))
    return model


def main() -> None:
    torch.manual_seed(0)
    default = Config().batch_size
    rows: list[tuple] = []
    batches = {
        size: training_step(net := Net(), recipe_optimizer(net), size) for size in (125, 250, default, 1000, 2000)
    }
    for size, times in alternate(batches, ROUNDS).items():
        median, spread = median_and_half_iqr(times)
        rows.append(("batch size", size, 1000 * median, 1000 * spread, round(size / median)))
    step = batches[default]

    def steps(count: int) -> None:
        for _ in range(count):
            step()

    counts = {count: lambda given=count: steps(given) for count in (1, 2, 4, 8)}
    for count, times in alternate(counts, ROUNDS).items():
        median, spread = median_and_half_iqr(times)
        rows.append(("images", count * default, 1000 * median, 1000 * spread, round(count * default / median)))
    widths = {}
    for factor in (0.5, 1.0, 1.5, 2.0):
        model = widened(Net(), factor)
        parameters = sum(p.numel() for p in model.parameters())
        widths[f"{factor:g} ({parameters:,})"] = training_step(model, recipe_optimizer(model), default)
    for width, times in alternate(widths, ROUNDS).items():
        median, spread = median_and_half_iqr(times)
        rows.append(("width (parameters)", width, 1000 * median, 1000 * spread, round(default / median)))
    report("growth", ("grows", "to", "ms", "± ms", "images/s"), rows)


if __name__ == "__main__":
    main()
