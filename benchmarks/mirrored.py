"""A network of `Net`'s size whose filters come in mirrored pairs, tried in place of `Net`; see docs/search.md.

Half of the filters are learnt, the other half are their mirror images (Cohen & Welling, "Group equivariant
convolutional networks", 2016), so that a picture and its mirror image get the same answer. 326 million multiply-adds.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import Residual


class MirroredNet(nn.Module):
    """2,034,040 parameters for 10 classes; float (N, 3, H, W) normalised -> log-probabilities (N, num_classes)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Sequential(stem(48), conv_bn(48, 80, pool=True))  # (N, 80, 16, 16)
        self.c2 = nn.Sequential(
            Residual(conv_bn(80, 80), conv_bn(80, 80)), conv_bn(80, 288, pool=True)
        )  # (N, 288, 8, 8)
        self.c3 = nn.Sequential(
            Residual(conv_bn(288, 288, dilation=2), conv_bn(288, 288)), conv_bn(288, 608, pool=True)
        )  # (N, 608, 4, 4)
        self.c4 = nn.Sequential(Residual(*separable(608, 608)), *separable(608, 408))  # (N, 408, 4, 4)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(204, num_classes, bias=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.gap(self.c4(self.c3(self.c2(self.c1(x)))))  # (N, 408, 1, 1)
        return F.log_softmax(
            self.fc(x.unflatten(1, (2, -1)).mean(1).flatten(1)).float(), dim=1
        )  # the mean of each pair


class MirroredConv2d(nn.Conv2d):
    """A convolution that learns half of its filters; the other half are their mirror images, left and right.

    (N, in, H, W) -> (N, out, H, W). Of the channels, the second half holds the partners of the first: mirror the input,
    and the output is mirrored, too, with the halves exchanged. The weight is (out / 2, in / groups, height, width).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=False, **options)
        self.weight = nn.Parameter(self.weight.detach()[: out_channels // 2].clone())
        # The partner of a filter meets the partner of each channel; colours and a depthwise filter's one have none.
        self.shift = 0 if in_channels == 3 or self.groups > 1 else in_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        filters = torch.cat([self.weight, self.weight.roll(self.shift, 1).flip(3)])
        return F.conv2d(x, filters, None, self.stride, self.padding, self.dilation, self.groups)


class MirroredBatchNorm2d(nn.Module):
    """BatchNorm in which the partners of a pair share mean, variance, scale and shift; (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.single = nn.BatchNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, -1)).movedim(1, 4).flatten(3)  # (N, C / 2, H, 2 W); in channels_last, only a view
        return self.single(x).unflatten(3, (-1, 2)).movedim(4, 1).flatten(1, 2)


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    dilation: int = 1,
    groups: int = 1,
    pool: bool = False,
    activation: bool = True,
) -> nn.Sequential:
    """As `model.conv_bn`, of mirrored layers."""
    padding = dilation * (kernel_size // 2)
    conv = MirroredConv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, groups=groups)
    if kernel_size == 3 and groups == 1:
        nn.init.dirac_(conv.weight.data[: max(in_channels // 2, 1)])
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if pool:
        layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
    layers["bn"] = MirroredBatchNorm2d(out_channels)
    if activation:
        layers["act"] = nn.SiLU()
    return nn.Sequential(layers)


def separable(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """A depthwise 3x3 and a pointwise convolution."""
    return (
        conv_bn(in_channels, in_channels, groups=in_channels, activation=False),
        conv_bn(in_channels, out_channels, kernel_size=1),
    )


def stem(out_channels: int) -> nn.Sequential:
    """A 3x3 convolution that starts as a cosine transform over space and colour; (N, 3, H, W) -> (N, out, H, W).

    From left to right, a filter is the flat pattern plus the slope, whose mirror image is the flat one minus it, so
    that a pair holds both; each comes with its negative. Filters beyond 18 are the patterns with a bar in the middle.
    """
    rows = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))  # flat, slope, bar
    columns = torch.stack([(rows[0] + rows[1]) / math.sqrt(2), rows[2]])
    colours = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))  # (component, RGB)
    filters = torch.einsum("hx,vy,kc->hvkcyx", columns, rows, colours).reshape(2, 9, 3, 3, 3)
    filters = torch.cat([filters[0], -filters[0], filters[1]])[: out_channels // 2]
    layer = conv_bn(3, out_channels)
    layer.get_parameter("conv.weight").data[: len(filters)] = filters
    return layer
