"""`Net`, 2,034,040 parameters: CIFAR-10 images in, log-probabilities out.

Needs torch alone, and for `Net.from_pretrained()` the file weights/cifar10.pt beside it:

    from model import Net
    log_probs = Net().eval()(images)  # (N, 3, 32, 32) -> (N, 10)
"""

import hashlib
import io
import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["Net", "WeightsError", "receptive_field"]

WEIGHTS = Path(__file__).with_name("weights") / "cifar10.pt"  # see weights/README.md
READER = Path(__file__).with_name("machinery") / "weights.py"  # of other people's files
WEIGHTS_SHA256 = "238140f42595c7c6e29fe008e99324bb8fe4c6ca8d0ffca8b924c56b04328a46"


class WeightsError(RuntimeError):
    """A file of weights is missing, damaged or of another network; the message names it."""


class Net(nn.Module):
    """A convolutional network for small colour images, 2,034,040 parameters for 10 classes.

    The budget goes to the dense 3x3 convolutions at 8x8 pixels, where a parameter is used often enough to be worth
    training; the depthwise-separable ones add depth at the end for a ninth of the cost.

    Attributes:
        classes: Their names, a tuple in the order of the outputs.
        size: Side of the training images in pixels.
        mean, std: Of their channels, lists on the scale 0-1, for normalisation.
        trained_on: These four as a dict, to be read or set; None stands for unknown.

    Shapes:
        input: float (N, 3, H, W) of any precision, normalised by mean and std; made for 32x32, works for H, W >= 16.
        output: float (N, num_classes), natural-log probabilities, for `F.nll_loss` and `F.cross_entropy` alike, since
            log_softmax leaves its own output unchanged.

    Raises ValueError if `num_classes` is not a positive integer, or the input is not as above.

    The layout follows airbench94 (K. Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024): a decorrelating 2x2 stem,
    pooling before BatchNorm, and filters that start as the identity. A convolution with pooling and a residual pair in
    turn follow the ResNet-9 of D. Page ("How to train your ResNet", 2018).
    """

    __jit_unused_properties__ = ("trained_on",)  # TorchScript takes the network alone

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        if num_classes is True or not isinstance(num_classes, SupportsIndex) or operator.index(num_classes) < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        self.trained_on = {}

        # C1 takes the image apart into uncorrelated colour edges and gathers them into 80 features; it alone sees full
        # resolution, so it is narrow and pools at once.
        self.c1 = nn.Sequential(
            decorrelating_stem(32),  # (N, 32, 31, 31); BatchNorm is fast on multiples of 16
            conv_bn(32, 80, pool=True),  # (N, 80, 16, 16)
        )
        # C2 combines edges into textures, then widens to 224 before the next halving, so that nothing is lost.
        self.c2 = nn.Sequential(
            Residual(conv_bn(80, 80), conv_bn(80, 80)),  # (N, 80, 16, 16)
            conv_bn(80, 224, pool=True),  # (N, 224, 8, 8)
        )
        # C3 recognises parts: the dilated convolution looks over 5 of the 8 positions at once, so that at the end every
        # place sees all but a row of the image, and the dense one fills in between.
        self.c3 = nn.Sequential(
            Residual(conv_bn(224, 224, dilation=2), conv_bn(224, 224)),  # (N, 224, 8, 8)
            conv_bn(224, 324, pool=True),  # (N, 324, 4, 4)
        )
        # C4 composes parts into objects with depthwise-separable convolutions, which add depth cheaply where the maps
        # are small and channels matter more than places.
        self.c4 = nn.Sequential(
            Residual(depthwise_separable(324, 324)),  # (N, 324, 4, 4)
            depthwise_separable(324, 186),  # (N, 186, 4, 4)
        )
        # GAP averages what is left, so the classifier needs a weight per feature and class; any input size will do.
        self.gap = nn.AdaptiveAvgPool2d(1)  # (N, 186, 1, 1)
        self.fc = nn.Linear(186, operator.index(num_classes), bias=False)
        # The order of numbers in memory in which convolutions are fastest, on CPUs as on GPUs.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.logits(x), dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """The scores before the softmax, float32 (N, num_classes), for images as `forward` takes them."""
        if not torch.jit.is_scripting():
            x = checked_images(x, next(self.parameters(), x).dtype)
        x = self.c4(self.c3(self.c2(self.c1(x))))  # (N, 186, ceil((H - 1) / 8), ceil((W - 1) / 8))
        return self.fc(self.gap(x).flatten(1)).float()

    @property
    def trained_on(self) -> dict[str, Any]:
        return {"classes": self.classes, "size": self.size, "mean": self.mean, "std": self.std}

    @trained_on.setter
    def trained_on(self, known: dict[str, Any]) -> None:
        self.classes, self.size, self.mean, self.std = map(known.get, ("classes", "size", "mean", "std"))

    @torch.no_grad()
    def apply_temperature(self, temperature: float) -> None:
        """Divides all logits by this number from now on, see `train.temperature_of`; the predicted classes stay."""
        if not isinstance(self.fc, nn.Linear):
            raise TypeError(f"a temperature needs one nn.Linear as the classifier `fc`, got {type(self.fc).__name__}")
        for parameter in self.fc.parameters():  # also the bias of a linear layer of your own
            parameter.div_(temperature)

    @classmethod
    def from_pretrained(cls, file: str | Path | None = None, *, num_classes: int | None = None) -> "Net":
        """A trained network, in eval mode, on the CPU.

        Args:
            file: A state dict or a checkpoint that holds one, also of a wrapped or compiled network, for any number of
                classes; or a run's folder. By default the pretrained weights, see weights/README.md.
            num_classes: If not the file's, the classifier is fresh, to be trained.

        Raises WeightsError if the file is missing, damaged, of another network, or not of weights alone.
        """
        with torch.random.fork_rng(devices=[]):
            net = _pretrained(cls()) if file is None else _read(file, cls)
        if num_classes is not None and num_classes != net.fc.out_features:
            net.fc, net.classes = cls(num_classes).fc, None
        return net.eval()


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, dilation: int = 1, groups: int = 1, pool: bool = False
) -> nn.Sequential:
    """Convolution without bias, [2x2 max pool], BatchNorm, SiLU; (N, in, H, W) -> (N, out, H, W) or half of it.

    Pooling comes before BatchNorm so that the rest handles a quarter of the numbers; an odd last row or column is kept.
    Dense 3x3 filters start as the identity (Zagoruyko & Komodakis, "DiracNets", 2017) on as many channels as there are,
    so the deep network begins as a shallow one.
    """
    padding = dilation * ((kernel_size - 1) // 2)  # none for 2x2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, 1, padding, dilation, groups, bias=False)
    if kernel_size == 3 and groups == 1:
        nn.init.dirac_(conv.weight.data[:in_channels])
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if pool:
        layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
    layers |= {"bn": nn.BatchNorm2d(out_channels), "act": nn.SiLU()}
    return nn.Sequential(layers)


class Residual(nn.Sequential):
    """Layers whose output is added to their input, (N, C, H, W). He et al., 2016."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:  # and not super().forward(x), which TorchScript does not know
            y = layer(y)
        return x + y


def depthwise_separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """One 3x3 filter per channel, then a 1x1 convolution, BatchNorm after each; (N, in, H, W) -> (N, out, H, W).

    Chollet, "Xception", 2017, without an activation in between.
    """
    depthwise = conv_bn(in_channels, in_channels, groups=in_channels)[:-1]
    pointwise = conv_bn(in_channels, out_channels, kernel_size=1)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def decorrelating_stem(out_channels: int) -> nn.Sequential:
    """A 2x2 convolution that starts as a cosine transform over space and colour, then BatchNorm and SiLU.

    (N, 3, H, W) -> (N, out, H - 1, W - 1). The principal components of small patches of natural images are nearly the
    cosine transform of brightness and two opponent colours (Ruderman et al., 1998), so with BatchNorm this whitens the
    input without looking at data. Each filter comes with its negative, since SiLU keeps one sign; channels beyond 24
    start at random.
    """
    cosine = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)  # (frequency, position)
    colour = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))  # (component, RGB)
    filters = torch.einsum("uy,vx,kc->uvkcyx", cosine, cosine, colour).reshape(12, 3, 2, 2)
    stem = conv_bn(3, out_channels, kernel_size=2)
    filters = torch.cat([filters, -filters])[:out_channels]
    stem.get_parameter("conv.weight").data[: len(filters)] = filters
    return stem


def checked_images(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float images (N, 3, H, W) in the network's precision; ValueError if they are none."""
    if isinstance(x, fx.Proxy):  # a tracer's, of images that are not there yet
        return x
    is_fit = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= 16
    if not is_fit or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"expected normalised float images (N, 3, H, W) with H, W >= 16, got {got}; add a batch dimension with "
            "x.unsqueeze(0), put channels first with x.permute(0, 3, 1, 2), scale to 0-1, subtract MEAN, divide by STD"
        )
    return x.to(dtype)


def receptive_field(net: nn.Module) -> dict[str, int]:
    """The side in pixels of the receptive field of each block before the GAP: {"c1": 5, ...}.

    Blocks with convolutions or max pools are assumed to follow each other, as in `Net`; each layer widens the field by
    (kernel - 1) * dilation * jump and multiplies the jump by its stride.
    """
    size, jump, fields = 1, 1, {}
    for name, block in net.named_children():
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                sizes = (layer.kernel_size, layer.stride, layer.dilation)
                kernel, stride, dilation = (v[0] if isinstance(v, tuple) else v for v in sizes)
                size += (kernel - 1) * dilation * jump
                jump *= stride
                fields[name] = size
    return fields


def _pretrained(net: Net) -> Net:
    """The pretrained network, whose file is checked by its hash."""
    content = WEIGHTS.read_bytes() if WEIGHTS.is_file() else b""
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise WeightsError(f"{WEIGHTS} is missing or not that of this model.py; take both from one version")
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    net.load_state_dict(saved["model"])
    net.trained_on = saved
    return net


def _read(file: str | Path, make: Callable[[int], Net]) -> Net:
    """The network in a user's file, by the reader beside this module, whatever `machinery` a user may have."""
    if not READER.is_file():
        raise WeightsError(f"{file} cannot be read without {READER}, which reads all but the pretrained weights")
    reader = ModuleType("_reader")
    SourceFileLoader(reader.__name__, str(READER)).exec_module(reader)
    try:
        return reader.read_network(file, make)
    except reader.FileError as error:
        raise WeightsError(str(error)) from error
