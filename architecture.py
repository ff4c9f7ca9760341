"""The network, drawn from its layers."""

import copy

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from dataset import SIZE
from model import Residual, receptive_field

# Kind of convolution -> colour, colour-blind safe (Okabe & Ito, 2008)
KINDS = {"stem": "#999999", "3×3": "#0072B2", "dilated": "#009E73", "depthwise": "#E69F00", "pointwise": "#F0E442"}


def plot_architecture(model: nn.Module, size: int = SIZE) -> Figure:
    """The convolutions of `Net`, or of a network of blocks like its own, for images of (3, size, size).

    Each is as tall as its output after pooling and as wide as that has channels; numbers below are channels and pixels.
    Above each block stand its parameters and the receptive field at its end; arrows are shortcuts.
    """
    probe, shapes = copy.deepcopy(model).cpu().float().eval(), {}
    layers = {
        name: layer for name, layer in probe.named_modules() if isinstance(getattr(layer, "conv", None), nn.Conv2d)
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: output.shape[1:]}))
    with torch.no_grad():
        probe(torch.zeros(1, 3, size, size))
    figure, axes = plt.subplots(figsize=(12, 3.6), layout="constrained")
    step, bottom, ends, used = 13.5, -0.6 * size, {}, {}
    x = 0.0  # the middle of what is drawn last
    axes.add_patch(Rectangle((-1.5, -size / 2), 3, size, facecolor="w", edgecolor="k"))
    axes.text(x, bottom, f"image\n3, {size}×{size}", ha="center", va="top")
    for block, field in receptive_field(probe).items():
        x += 4
        left = x + step / 2
        for name in (name for name in layers if name.startswith(f"{block}.")):
            x += step
            channels, height, width = shapes[name]
            kind, drawn = _kind(layers[name].conv), channels / 36  # the latter is how wide it is drawn
            shape = Rectangle((x - drawn / 2, -height / 2), drawn, height)
            shape.set(facecolor=KINDS[kind], edgecolor="k", label=kind)
            used[kind] = axes.add_patch(shape)
            axes.text(x, bottom, f"{channels}\n{height}×{width}", ha="center", va="top")
            ends[name] = x - step / 2, x + step / 2, height / 2
        right = x + step / 2
        parameters = sum(p.numel() for p in probe.get_submodule(block).parameters())
        title = f"{block.upper()}: {parameters:,} parameters\nreceptive field {field}×{field} px"
        axes.text((left + right) / 2, 0.9 * size, title, ha="center", va="top", fontsize=9)
        axes.axvspan(left, right, 0.1, color="0.94", zorder=-1)
    for name, layer in probe.named_modules():
        if isinstance(layer, Residual):
            inside = [ends[key] for key in ends if key.startswith(f"{name}.")]
            start, end = inside[0][0], inside[-1][1]
            top = max(height for *_, height in inside) + size / 8
            axes.plot([start, start, end], [0, top, top], color="k", linewidth=1)
            axes.annotate(
                "", (end, 0), (end, top), arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "facecolor": "k"}
            )
    axes.plot([0, x + step], [0, 0], color="k", linewidth=1, zorder=0)
    axes.text(x + step, 0, " average,\n linear,\n log-softmax", va="center")
    axes.set(xlim=(-5, x + 2.2 * step), ylim=(-size, 0.95 * size))
    axes.axis("off")
    axes.legend(handles=list(used.values()), ncols=len(used), loc="lower left", frameon=False)
    note = "width: channels; height: pixels after pooling; arrows: shortcuts"
    axes.text(x + 2 * step, -0.96 * size, note, ha="right", fontsize=9)
    plt.close(figure)
    return figure


def _kind(conv: nn.Conv2d) -> str:
    """What a convolution is called in the picture of the architecture."""
    if conv.groups == conv.in_channels > 1:
        return "depthwise"
    if conv.kernel_size == (1, 1):
        return "pointwise"
    return "dilated" if conv.dilation > (1, 1) else "stem" if conv.in_channels == 3 else "3×3"
