"""The layout and the input of the network that this project reimplements, as the baseline to compare with."""

from common import FOLDER  # noqa: F401  (puts the repository on the path)
from torch import nn


def original_network() -> nn.Module:
    """2,034,040 parameters from (N, 3, 32, 32) to log-probabilities (N, 10).

    From the layer table of github.com/ShikhaERAV2/Session9: nothing is pooled before 24x24, the convolution that was
    meant to be depthwise has three groups, and the classifier's first layer alone has 819,300 parameters.
    """

    def block(in_channels: int, out_channels: int, kernel_size: int = 3, **options: int | bool) -> list[nn.Module]:
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
