"""What each part of the network and of the recipe is worth: one switch off at a time; tables in docs/ablation.md.

`python benchmarks/ablation.py` needs CIFAR-10, and two hours on two cores of a Zen 5.

It trains a run for each switch and each seed, in runs/, resumed or read where it is there already, and saves the test
accuracies of the last epoch in benchmarks/ablation_N_epochs.json. The network without a part gets nothing in its place,
so some are smaller or larger: their parameters are in the table.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import as_mean, continued, report
from torch import Tensor, nn

from model import Net, Residual, conv_bn
from train import Config, fit


class Scale(nn.Module):
    """A weight and a bias for each channel of (N, C, H, W): BatchNorm without the normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def replaced(net: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """`net` with `make(module)` in the place of each of its modules of this kind."""
    for name, module in list(net.named_modules()):
        if isinstance(module, kind):
            net.set_submodule(name, make(module))
    return net


def without_dilation(net: Net) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.dilation > (1, 1):
            layer.padding, layer.dilation = (1, 1), (1, 1)
    return net


def without_depthwise(net: Net) -> nn.Module:
    for block in net.c4.modules():
        if hasattr(block, "depthwise"):
            block.depthwise = nn.Identity()
    return net


def with_dense(net: Net) -> nn.Module:
    for name in ("c4.0.0", "c4.1"):
        out_channels, in_channels = net.get_parameter(f"{name}.pointwise.conv.weight").shape[:2]
        net.set_submodule(name, conv_bn(in_channels, out_channels))
    return net


def without_gap(net: Net) -> nn.Module:
    net.set_submodule("gap", nn.Identity())
    net.fc = nn.Linear(16 * net.fc.in_features, net.fc.out_features, bias=False)
    return net


AUGMENT = Config().augment
NETWORKS: dict[str, Callable[[Net], nn.Module]] = {
    "dilation off": without_dilation,
    "depthwise filters off, only 1×1 kept": without_depthwise,
    "dense 3×3 instead of depthwise-separable": with_dense,
    "BatchNorm off but for scale and shift, Muon's rescaling off": lambda net: replaced(
        net, nn.BatchNorm2d, lambda norm: Scale(norm.num_features)
    ),
    "GAP off, linear on all 4×4 places": without_gap,
    "shortcuts off": lambda net: replaced(net, Residual, lambda block: nn.Sequential(*block)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "augmentation off": {"augment": ()},
    **{f"{name} off": {"augment": tuple(n for n in AUGMENT if n != name)} for name in AUGMENT},
    "label smoothing off": {"label_smoothing": 0.0},
}
SWITCHES = (*NETWORKS, *SETTINGS)


def train(switch: str, epochs: int, seed: int) -> tuple[float, float, int]:
    """Test and training accuracy in percent after the last epoch, and the parameters."""
    name = f"ablation-{epochs}-{'-'.join(switch.replace(',', '').split())}-seed{seed}"
    config = continued(Config(epochs=epochs, seed=seed, name=name, **SETTINGS.get(switch, {})))
    torch.manual_seed(seed)
    net = NETWORKS.get(switch, lambda net: net)(Net())
    history = fit(config, net)
    return history["test_accuracy"][-1], history["train_accuracy"][-1], sum(p.numel() for p in net.parameters())


def rows(results: dict[str, list[tuple[float, float, int]]]) -> list[tuple]:
    """A line of the table for each switch, given what `train` returned for each seed; the first is the reference."""
    table, reference = [], statistics.fmean(test for test, *_ in next(iter(results.values())))
    for switch, runs in results.items():
        test, training, (parameters, *_) = zip(*runs, strict=True)
        difference = f"{statistics.fmean(test) - reference:+.2f}"
        table.append((switch, as_mean(test), difference, f"{statistics.fmean(training):.2f}", parameters))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--switches", nargs="+", default=SWITCHES, choices=SWITCHES)
    options = parser.parse_args(arguments)
    switches = "all on", *options.switches
    results = {switch: [train(switch, options.epochs, seed) for seed in options.seeds] for switch in switches}
    columns = "switch", "test accuracy, %", "difference, points", "training accuracy, %", "parameters"
    report(f"ablation_{options.epochs}_epochs", columns, rows(results), runs_each=len(options.seeds))


if __name__ == "__main__":
    main()
