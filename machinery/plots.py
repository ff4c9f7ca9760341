"""Helpers of utils.py's plots, the architecture, and attention maps."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from machinery.data.images import Images
from machinery.device import eval_mode

# Colour-blind safe (Okabe & Ito, 2008), on white as on black.
TRAIN, TEST, REFERENCE = "#0072B2", "#D55E00", "#808080"
RGB = ("#D55E00", "#009E73", "#0072B2")  # an image's channels
KINDS = {"stem": "#999999", "3×3": "#0072B2", "dilated 3×3": "#009E73", "depthwise 3×3": "#E69F00", "1×1": "#F0E442"}
# Whatever the user's style: class names are text, never mathematics or LaTeX; pictures stand upright, without a grid.
STYLE: dict[str, Any] = {"text.parse_math": False, "text.usetex": False, "axes.grid": False, "image.origin": "upper"}
STYLE |= {"image.interpolation": "nearest", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False}

P = ParamSpec("P")
Tile = tuple[str, np.ndarray | None]  # a title, and a picture (H, W, 3), uint8, or none


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with `STYLE` over the user's own style, and closes the figure for pyplot."""

    @functools.wraps(draw)
    def plot(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return plot


def draw_pictures(rows: Sequence[Sequence[Tile]], side: float, names: Sequence[str] = (), heading: str = "") -> Figure:
    """Rows of pictures, `side` inches wide, with titles and row names."""
    gap, line = 0.08, 0.17  # in inches, as all coordinates
    left = gap + 0.085 * max((len(part) for name in names for part in name.split("\n")), default=0)
    width = max(left + max(map(len, rows), default=0) * (side + gap) + gap, left + 0.1 * len(heading))
    above = [gap + line * max(title.count("\n") + (title > "") for title, _ in row) for row in rows]
    height = y = sum(above) + len(rows) * side + gap + 2 * line
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.text(left, y - line, heading, fontsize=11, va="center")
    y -= 2 * line
    for row, room, name in zip(rows, above, names or [""] * len(rows), strict=True):
        y -= room + side
        axes.text(left - gap, y + side / 2, name, ha="right", va="center")
        for column, (title, picture) in enumerate(row):
            x = left + column * (side + gap)
            axes.text(x + side / 2, y + side + 0.04, title, ha="center")
            if picture is not None:
                axes.imshow(picture, extent=(x, x + side, y, y + side))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="auto")
    axes.axis("off")
    return figure


def shortened(name: str, length: int = 12) -> str:
    """A class name that fits above a picture or beside an axis."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def check_predictions(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Refuses log-probabilities without a row per label and a column per class."""
    if log_probs.shape != (len(labels), len(classes)):
        expected = f"({len(labels)} labels, {len(classes)} classes)"
        raise ValueError(f"log_probs must be of shape {expected}, got {tuple(log_probs.shape)}")


def check_order(dataset: Images, log_probs: Tensor, labels: Tensor) -> None:
    """Refuses predictions that are not in the order of the dataset's images."""
    if not isinstance(dataset, Images):
        raise ValueError(f"dataset must be Images, such as CIFAR10, to have pictures, got {type(dataset).__name__}")
    if labels.tolist() != dataset.labels.tolist():
        raise ValueError(
            f"the {len(labels)} labels are not those of the dataset's {len(dataset)} images in their order; give what "
            "predict returned for a loader of this dataset that does not shuffle"
        )
    check_predictions(log_probs, labels, dataset.classes)


@styled
def draw_architecture(model: nn.Module, size: int, fields: dict[str, int], shortcuts: Iterable[str]) -> Figure:
    """Draws `utils.plot_architecture` with each block's receptive field and the residual layers' names."""
    probe, shapes = copy.deepcopy(model).cpu().float().eval(), {}
    layers = {name: part for name, part in probe.named_modules() if isinstance(getattr(part, "conv", None), nn.Conv2d)}
    if not layers:
        raise ValueError(f"model must have blocks like Net's, of layers with a convolution `conv`; got {type(model)}")
    for name, layer in layers.items():
        for part, key in ((layer, name), (layer.conv, f"{name}.conv")):
            part.register_forward_hook(lambda _, inputs, output, key=key: shapes.update({key: output.shape[1:]}))
    with torch.no_grad():
        probe(torch.zeros(1, 3, size, size))
    ink, paper = plt.rcParams["text.color"], plt.rcParams["figure.facecolor"]
    figure, axes = plt.subplots(figsize=(13, 4), layout="constrained")
    axes.bar([-1, 0, 1], 32, 1, -16, color=RGB, edgecolor=ink)
    axes.text(0, -20, f"image\n3, {size}×{size}", ha="center", va="top")
    x, step, places, used = 2.0, 14, {}, {}  # x is the middle of what is drawn last
    for block, field in fields.items():
        x += 4
        left = x + step / 2
        for name in (name for name in layers if name.startswith(f"{block}.")):
            x += step
            channels, pixels, _ = shapes[name]
            height, kind = 32 * pixels / size, _kind(layers[name].conv)
            before = 32 * shapes[f"{name}.conv"][1] / size  # pooling
            if before > height:
                axes.bar(x, before, channels / 36, -before / 2, color="none", edgecolor=ink, linestyle=":")
            used[kind] = axes.bar(x, height, channels / 36, -height / 2, color=KINDS[kind], edgecolor=ink)
            axes.text(x, -20, f"{channels}\n{pixels}×{pixels}", ha="center", va="top")
            places[name] = x, before / 2 + 4
        axes.axvspan(left, x + step / 2, color=ink, alpha=0.07, linewidth=0, zorder=-1)
        parameters = sum(p.numel() for p in probe.get_submodule(block).parameters())
        title = f"{block.upper()}: {parameters:,} parameters\nreceptive field {field}×{field} px"
        axes.text((left + x + step / 2) / 2, 30, title, ha="center", va="top", fontsize=9)
    for name in shortcuts:
        middles, tops = zip(*(places[key] for key in places if key.startswith(f"{name}.")), strict=True)
        start, end, top = middles[0] - step / 2, middles[-1] + step / 2, max(tops)
        axes.plot([start, start, end], [0, top, top], color=ink, linewidth=1)
        axes.annotate("", (end, 1), (end, top), arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "color": ink})
        axes.plot(end, 0, marker="o", markersize=11, markerfacecolor=paper, color=ink)  # ⊕
        axes.plot(end, 0, marker="+", markersize=9, color=ink)
    axes.plot([0, x + step], [0, 0], color=ink, linewidth=1, zorder=0)
    axes.text(x + step, 0, " average,\n linear,\n log-softmax", va="center")
    axes.set(xlim=(-7, x + 2.2 * step), ylim=(-29, 32), aspect="equal")
    axes.axis("off")
    title = "width: channels; height: pixels, dotted before pooling; ⊕: a shortcut is added"
    axes.legend(used.values(), used, ncols=len(used), title=title, loc="upper center", bbox_to_anchor=(0.5, 0))
    return figure


def _kind(conv: nn.Conv2d) -> str:
    """The name of a convolution's kind in the architecture plot."""
    if conv.groups == conv.in_channels > 1:
        return "depthwise 3×3"
    if conv.kernel_size == (1, 1):
        return "1×1"
    return "dilated 3×3" if conv.dilation > (1, 1) else "stem" if conv.in_channels == 3 else "3×3"


@styled
def plot_attention(dataset: Images, log_probs: Tensor, labels: Tensor, model: nn.Module, layer: nn.Module) -> Figure:
    """Where the model looks for the predicted and the true class, by Grad-CAM (Selvaraju et al., 2017).

    Shows the four most confident mistakes, then three correct predictions; each map has its own scale. It explains the
    model's `logits` if it has that method, else its outputs. `layer`, such as `model.c4`, must return (N, C, h, w).
    """
    check_order(dataset, log_probs, labels)
    predicted, order = log_probs.argmax(1), log_probs.amax(1).argsort(descending=True, stable=True).tolist()
    wrong = [i for i in order if predicted[i] != labels[i]][:4]
    surest = {int(labels[i]): i for i in reversed(order) if predicted[i] == labels[i]}  # of each class
    chosen = wrong + sorted(surest.values(), key=order.index)[:3]
    images, pictures = torch.stack([dataset[i][0] for i in chosen]), dataset.images[chosen].numpy()
    rows = [[("mistake" if i in wrong else "correct", picture) for i, picture in zip(chosen, pictures, strict=True)]]
    peaks: list[Tensor] = []
    for classes in (predicted[chosen], labels[chosen]):
        maps = _grad_cam(images, classes, model, layer)  # (N, H, W)
        peaks.append(maps.amax((1, 2)).clamp(min=1e-12))
        heat = plt.get_cmap("inferno")((maps / peaks[-1][:, None, None]).numpy())[..., :3]
        overlaid = (0.45 * pictures.mean(3, keepdims=True) + 0.55 * 255 * heat).astype(np.uint8)
        shares = (100 * peaks[-1] / peaks[0]).clamp(max=999).tolist()
        titles = [
            f"{shortened(dataset.classes[k], 9)} ({share:.0f} %)" for k, share in zip(classes, shares, strict=True)
        ]
        rows.append(list(zip(titles, overlaid, strict=True)))
    rows[2] = rows[2][: len(wrong)] or [("", None)]  # of the others it is the same
    names = ["", "for the\npredicted class", "for the true class\n(peak, % of the\npredicted one's)"]
    return draw_pictures(rows, 1.35, names, "Bright: what counts most, from 0 to the peak of each map")


def _grad_cam(images: Tensor, classes: Tensor, model: nn.Module, layer: nn.Module) -> Tensor:
    """The maps (N, H, W), >= 0, for `classes` (N,) in images (N, 3, H, W)."""
    from captum.attr import LayerAttribution, LayerGradCam  # noqa: PLC0415  takes seconds, and only this needs it

    device, cam = next(model.parameters()).device, LayerGradCam(getattr(model, "logits", model), layer)
    with eval_mode(model):
        maps = cam.attribute(images.to(device), classes.to(device), relu_attributions=True)
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(
            f"layer must return maps (N, C, H, W), such as a convolution's; a {type(layer).__name__} did not"
        )
    return LayerAttribution.interpolate(maps, images.shape[2:], "bicubic")[:, 0].detach().cpu().clamp(min=0)
