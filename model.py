"""The network: `Net`, 2,034,040 parameters, CIFAR-10 images in, log-probabilities out.

Importing this module has no side effects, and no package but torch is needed:

    from model import Net
    log_probs = Net().eval()(images)  # (N, 3, 32, 32) -> (N, 10)
"""

import math
import operator
from collections import OrderedDict
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from machinery.weights import WeightsError, load_weights, read_weights

__all__ = ["Net", "WeightsError", "receptive_field"]

WEIGHTS = Path(__file__).with_name("weights") / "cifar10.pt"  # see weights/README.md
WEIGHTS_SHA256 = "dc77d41aa5241d3843016443e8195ddce3bac2c563d2c9ecc1b0a309b60c3332"


class Net(nn.Module):
    """A convolutional network for small colour images, 2,034,040 parameters for 10 classes.

    The budget goes to the dense 3x3 convolutions at 8x8 pixels, where a parameter is used often enough to
    be worth training and the processor runs near its limit; the depthwise-separable convolutions add two
    layers of depth at the end for a ninth of what dense ones would cost.

    Args:
        num_classes: How many classes to tell apart, at least 1; an integer of any kind, also NumPy's.

    Attributes:
        classes: Their names, a tuple in the order of the outputs, if the file that the weights came from had them;
            else None.
        size: The side of the images that it was trained on, in pixels, likewise.
        mean: With what these were normalised, of each channel, on the scale 0-1, likewise.
        std: Likewise.

    Shapes:
        input: float (N, 3, H, W) of any precision, normalised with the training set's mean and standard
            deviation; made for 32x32, works for any H, W >= 16.
        output: float (N, num_classes), natural-log probabilities: right for `F.nll_loss`, and for
            `F.cross_entropy` alike, since log_softmax leaves its own output unchanged.

    Raises:
        ValueError: `num_classes` is not a positive integer, or the input is not float (N, 3, H, W).

    The layout follows airbench94 (K. Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024): a decorrelating
    2x2 stem, pooling before BatchNorm, and filters that start as the identity; a convolution with pooling and a
    residual pair in turn follow the ResNet-9 of D. Page ("How to train your ResNet", 2018).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        if num_classes is True or not isinstance(num_classes, SupportsIndex) or operator.index(num_classes) < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        num_classes = operator.index(num_classes)
        self.classes: tuple[str, ...] | None = None
        self.size: int | None = None
        self.mean: list[float] | None = None
        self.std: list[float] | None = None

        # C1 takes the image apart into uncorrelated colour edges (the 2x2 stem) and gathers them
        # into 80 features; it alone sees full resolution, so it is narrow and pools at once.
        # 32 channels of the stem, since BatchNorm is fast on multiples of 16.
        self.c1 = nn.Sequential(
            decorrelating_stem(32),  # (N, 32, 31, 31)
            conv_bn(32, 80, pool=True),  # (N, 80, 16, 16)
        )
        # C2 combines edges into textures, then widens to 224 before the next halving, so that
        # nothing is thrown away while the image still has detail.
        self.c2 = nn.Sequential(
            Residual(conv_bn(80, 80), conv_bn(80, 80)),  # (N, 80, 16, 16)
            conv_bn(80, 224, pool=True),  # (N, 224, 8, 8)
        )
        # C3 recognises parts: the dilated convolution looks over 5 of the 8 positions at once, so that
        # at the end every place sees all but a row of the image, and the dense one fills in between.
        self.c3 = nn.Sequential(
            Residual(conv_bn(224, 224, dilation=2), conv_bn(224, 224)),  # (N, 224, 8, 8)
            conv_bn(224, 324, pool=True),  # (N, 324, 4, 4)
        )
        # C4 composes parts into objects with two depthwise-separable convolutions, which add depth
        # cheaply where the maps are small and channels matter more than places.
        self.c4 = nn.Sequential(
            Residual(depthwise_separable(324, 324)),  # (N, 324, 4, 4)
            depthwise_separable(324, 186),  # (N, 186, 4, 4)
        )
        # GAP averages what is left of the image, so the classifier needs one weight per feature
        # and class, and any input size will do.
        self.gap = nn.AdaptiveAvgPool2d(1)  # (N, 186, 1, 1)
        self.fc = nn.Linear(186, num_classes, bias=False)
        # The order of numbers in memory in which convolutions are fastest, on CPUs as on GPUs.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.logits(x), dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """The scores before the softmax, float32 (N, num_classes), for images as `forward` takes them."""
        if not torch.jit.is_scripting():  # TorchScript takes the network alone
            x = checked_images(x, next(self.parameters(), x).dtype)
        x = self.c4(self.c3(self.c2(self.c1(x))))  # (N, 186, ceil((H - 1) / 8), ceil((W - 1) / 8))
        return self.fc(self.gap(x).flatten(1)).float()

    @torch.no_grad()
    def divide_logits(self, temperature: float) -> None:
        """Divides all logits by this number from now on; the predicted classes stay. See `train.temperature_of`."""
        for parameter in self.fc.parameters():  # also of a linear layer of your own, with a bias
            parameter.div_(temperature)

    @classmethod
    def from_pretrained(cls, file: str | Path | None = None, *, num_classes: int | None = None) -> "Net":
        """A trained network, in eval mode, on the CPU.

        Args:
            file: A state dict or a checkpoint that holds one, also of a wrapped or compiled network, for any number of
                classes; or a run's folder. See `read_weights`. By default the weights that ship beside this module,
                trained on CIFAR-10: weights/README.md says how, and what they are good for.
            num_classes: If it is not the file's, the classifier is a fresh one, to be trained.

        Raises:
            WeightsError: The file is missing, damaged or of another network, or not of weights alone.
            ValueError: `num_classes` is not a positive integer.
        """
        path = WEIGHTS if file is None else file
        saved = read_weights(path, WEIGHTS_SHA256 if file is None else None)
        fc = saved["model"].get("fc.weight", torch.empty(0))
        outputs = len(fc) if fc.ndim == 2 and len(fc) else 10  # which load_weights will refuse
        with torch.random.fork_rng(devices=[]):
            net = cls(outputs)
        load_weights(net, saved["model"], path)
        if len(saved["classes"] or ()) == outputs:
            net.classes = saved["classes"]
        for name, value in saved["images"].items():
            setattr(net, name, value)
        if num_classes is not None and num_classes != outputs:
            net.fc, net.classes = cls(num_classes).fc, None
        return net.eval()


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    dilation: int = 1,
    groups: int = 1,
    padding: int | None = None,
    pool: bool = False,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution without bias, [2x2 max pool], BatchNorm, [SiLU]; (N, in, H, W) -> (N, out, H, W) or half of it.

    Pooling comes before BatchNorm so that the rest handles a quarter of the numbers; of an odd number of rows or
    columns it keeps the last. SiLU was as good as GELU on held-out images, within the noise of one run, and is cheaper.
    Dense 3x3 filters start as the identity on as many channels as there are (Zagoruyko & Komodakis, "DiracNets", 2017),
    so the deep network begins as a shallow one. BatchNorm's running statistics have PyTorch's momentum of 0.1, an
    average over the last ten batches or so.
    """
    if padding is None:
        padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    if kernel_size == 3 and groups == 1:
        nn.init.dirac_(conv.weight.data[:in_channels])
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if pool:
        layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
    layers["bn"] = nn.BatchNorm2d(out_channels)
    if activation:
        layers["act"] = nn.SiLU()
    return nn.Sequential(layers)


class Residual(nn.Sequential):
    """Layers whose output is added to their input; (N, C, H, W) -> the same. He et al., 2016."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:  # and not super().forward(x), which TorchScript does not know
            y = layer(y)
        return x + y


def depthwise_separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """One 3x3 filter per channel, then a 1x1 convolution across channels, BatchNorm after each.

    (N, in, H, W) -> (N, out, H, W). Chollet, "Xception", 2017, without an activation in between.
    """
    return nn.Sequential(
        OrderedDict(
            depthwise=conv_bn(in_channels, in_channels, groups=in_channels, activation=False),
            pointwise=conv_bn(in_channels, out_channels, kernel_size=1),
        )
    )


def decorrelating_stem(out_channels: int) -> nn.Sequential:
    """A 2x2 convolution that starts as a cosine transform over space and colour, then BatchNorm and SiLU.

    (N, 3, H, W) -> (N, out, H - 1, W - 1). The principal components of small patches of natural images are
    nearly the cosine transform of brightness and two opponent colours (Ruderman et al., 1998), so the filters
    decorrelate and BatchNorm equalises the variances: together they whiten the input without looking at data.
    Each filter comes with its negative, since SiLU keeps one sign; channels beyond 24 start at random.
    """
    cosine = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)  # (frequency, position)
    colour = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))  # (component, RGB)
    filters = torch.einsum("uy,vx,kc->uvkcyx", cosine, cosine, colour).reshape(12, 3, 2, 2)
    stem = conv_bn(3, out_channels, kernel_size=2, padding=0)
    filters = torch.cat([filters, -filters])[:out_channels]
    stem.get_parameter("conv.weight").data[: len(filters)] = filters
    return stem


def checked_images(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float images (N, 3, H, W) of any precision -> the same in that of the network; ValueError if they are none."""
    if isinstance(x, fx.Proxy):  # a tracer's, of images that are not there yet
        return x
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 16:
        raise ValueError(
            "expected a tensor of images (N, 3, H, W) with H, W >= 16, got "
            f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}; "
            "add a batch dimension with x.unsqueeze(0), or put channels first with x.permute(0, 3, 1, 2)"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"expected normalised float images, got {x.dtype}; scale them to 0-1, subtract MEAN and divide by STD, "
            "both in this repository's dataset.py"
        )
    return x if x.dtype == dtype else x.to(dtype)


def receptive_field(net: nn.Module) -> dict[str, int]:
    """The side in pixels of the square that one position of each block's output sees, before the GAP.

    Every block that holds convolutions or max pools is taken to follow the one before it, as in `Net`:
    each layer widens the field by (kernel - 1) * dilation * jump and multiplies the jump by its stride.

    Returns:
        Block name -> receptive field, in the order of the blocks; {"c1": 5, ...}.
    """
    size, jump, fields = 1, 1, {}
    for name, block in net.named_children():
        layers = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
        for layer in layers:
            kernel, stride, dilation = (
                v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.stride, layer.dilation)
            )
            size += (kernel - 1) * dilation * jump
            jump *= stride
        if layers:
            fields[name] = size
    return fields
