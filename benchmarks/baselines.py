"""The layouts that `Net` is compared with: of the network that this project reimplements, and of airbench94_muon."""

from typing import Any

from torch import nn


def original_network() -> nn.Module:
    """2,034,040 parameters from (N, 3, 32, 32) to log-probabilities (N, 10).

    From the layer table of github.com/ShikhaERAV2/Session9: nothing is pooled before 24x24, the convolution that was
    meant to be depthwise has three groups, and the classifier's first layer alone has 819,300 parameters.
    """

    def block(in_channels: int, out_channels: int, kernel_size: int = 3, **options: Any) -> list[nn.Module]:
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size, **{"bias": False, **options})
        return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32, padding=1),  # (N, 32, 32, 32)
        *block(32, 30),  # (N, 30, 30, 30)
        *block(30, 30, padding=1, groups=3, bias=True),
        *block(30, 32, kernel_size=1, bias=True),  # (N, 32, 30, 30)
        *block(32, 64, padding=1, dilation=2),  # (N, 64, 28, 28)
        *block(64, 64, padding=1, dilation=2),
        *block(64, 64, padding=1, dilation=2),  # (N, 64, 24, 24)
        *block(64, 128, padding=1),
        *block(128, 128, padding=1),
        *block(128, 128, padding=1),  # (N, 128, 24, 24)
        *block(128, 128, padding=1),
        *block(128, 256, padding=1),
        *block(256, 128, padding=1),  # (N, 128, 24, 24)
        nn.AvgPool2d(3),  # (N, 128, 8, 8)
        nn.Dropout(0.01),
        nn.Flatten(),
        nn.Linear(8192, 100),
        nn.Linear(100, 10),
        nn.LogSoftmax(dim=1),
    )


def airbench94_muon_network() -> nn.Module:
    """1,972,792 parameters from (N, 3, 32, 32) to logits (N, 10), to take its time; its weights start as torch's.

    From the layer table of airbench94_muon.py in github.com/KellerJordan/cifar10-airbench (K. Jordan, 2024), which
    reaches 94.01 % with six views in 8 epochs. There the stem's filters and BatchNorm's gains are not trained.
    """

    def block(in_channels: int, out_channels: int) -> list[nn.Module]:
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False}
        wide, deep = nn.Conv2d(in_channels, out_channels, **options), nn.Conv2d(out_channels, out_channels, **options)
        first = [wide, nn.MaxPool2d(2), nn.BatchNorm2d(out_channels), nn.GELU()]
        return [*first, deep, nn.BatchNorm2d(out_channels), nn.GELU()]

    return nn.Sequential(
        nn.Conv2d(3, 24, 2),  # (N, 24, 31, 31)
        nn.GELU(),
        *block(24, 64),  # (N, 64, 15, 15)
        *block(64, 256),  # (N, 256, 7, 7)
        *block(256, 256),  # (N, 256, 3, 3)
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(256, 10, bias=False),
    )
