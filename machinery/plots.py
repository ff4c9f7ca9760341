"""Pictures that take more work than a plot: the architecture, where a network looks, how far it can be believed."""

import copy
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from machinery.data.images import Images
from machinery.device import answering

TRAIN, TEST, ORIGINAL = "#0072B2", "#D55E00", "#666666"  # colour-blind safe (Okabe & Ito, 2008)
# Kind of convolution -> colour, colour-blind safe (Okabe & Ito, 2008)
KINDS = {"stem": "#999999", "3×3": "#0072B2", "dilated": "#009E73", "depthwise": "#E69F00", "pointwise": "#F0E442"}


def draw_architecture(model: nn.Module, size: int, fields: dict[str, int], shortcuts: Iterable[str]) -> Figure:
    """See `utils.plot_architecture`.

    Args:
        model: With blocks of layers that each have a convolution `conv`.
        size: Of the image, in pixels.
        fields: Block -> receptive field at its end, in pixels.
        shortcuts: The names of the layers around which a shortcut leads.
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
    for block, field in fields.items():
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
    for name in shortcuts:
        inside = [ends[key] for key in ends if key.startswith(f"{name}.")]
        start, end = inside[0][0], inside[-1][1]
        top = max(height for *_, height in inside) + size / 8
        axes.plot([start, start, end], [0, top, top], color="k", linewidth=1)
        arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "facecolor": "k"}
        axes.annotate("", (end, 0), (end, top), arrowprops=arrow)
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


def plot_attention(dataset: Images, log_probs: Tensor, model: nn.Module, layer: nn.Module) -> Figure:
    """Where a network looks, by Grad-CAM (Selvaraju et al., 2017): what stays light speaks for the class.

    Above, the ten most confident mistakes, with what speaks for the answer and what for the truth, and the second's
    peak in percent of the first's; below, the most confident right answer of each class. Each map is on its own scale.

    Args:
        dataset: The images, in the order of `log_probs`.
        log_probs: (N, 10), as `train.predict` returns them for `model`.
        model: The network; the scores that are explained are its `logits` if it has that method, else its answers.
        layer: The part of it whose output is weighed, such as `model.c4`.
    """
    probs, predicted = log_probs.exp().max(1)
    truth, count = dataset.labels, len(dataset.classes)
    order = probs.argsort(descending=True, stable=True)
    is_right = (predicted == truth)[order]
    wrong, surest = order[~is_right][:count].tolist(), order[is_right]
    right = [int(of_class[0]) for k in range(count) if len(of_class := surest[truth[surest] == k])]
    answer_maps = _grad_cam(dataset, wrong, predicted[wrong], model, layer)
    truth_maps = _grad_cam(dataset, wrong, truth[wrong], model, layer)
    right_maps = _grad_cam(dataset, right, predicted[right], model, layer)
    shares = (100 * truth_maps.amax((1, 2)) / _peaks(answer_maps)).clamp(max=999)  # the latter may be 0
    rows = [
        ("wrong", wrong, truth, None),
        ("for the answer", wrong, predicted, answer_maps),
        ("for the truth,\n% of the answer's", wrong, truth, truth_maps),
        ("right", right, truth, None),
        ("for the answer", right, predicted, right_maps),
    ]
    figure, grid = picture_grid(len(rows), count, width=10, title_height=0.1)
    for row, (name, chosen, classes, maps) in zip(grid, rows, strict=True):
        for k, (axes, i) in enumerate(zip(row, chosen, strict=False)):
            light = 1 if maps is None else 0.15 + 0.85 * (maps[k] / _peaks(maps)[k])[:, :, None].numpy()
            axes.imshow((dataset.images[i].numpy() * light).astype(np.uint8), interpolation="nearest")
            share = f" ({shares[k]:.0f} %)" if maps is truth_maps else ""
            axes.set_title(dataset.classes[int(classes[i])] + share, fontsize=9)
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
    return figure


def _peaks(maps: Tensor) -> Tensor:
    """(N,): the largest value of each map (N, H, W), above 0."""
    return maps.amax((1, 2)).clamp(min=1e-12)


def _grad_cam(dataset: Images, indices: list[int], classes: Tensor, model: nn.Module, layer: nn.Module) -> Tensor:
    """(N, H, W), >= 0: what speaks for `classes` (N,) in these images of `dataset`."""
    if not indices:
        return torch.zeros(0, 1, 1)
    from captum.attr import LayerAttribution, LayerGradCam  # noqa: PLC0415  takes seconds, and only this needs it

    device = next(model.parameters()).device
    images = torch.stack([dataset[i][0] for i in indices]).to(device)
    with answering(model):
        maps = LayerGradCam(getattr(model, "logits", model), layer).attribute(
            images, classes.to(device), relu_attributions=True
        )  # (N, 1, h, w)
    return LayerAttribution.interpolate(maps, images.shape[2:], "bicubic")[:, 0].detach().cpu().clamp(min=0)


def expected_calibration_error(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """In percent: how far confidence is from accuracy, over bins of equal width, weighted by their images.

    Naeini et al., 2015; Guo et al., 2017.

    Args:
        log_probs: (N, classes), natural.
        labels: (N,), the true classes.
        bins: Of the confidence, from 0 to 1.
    """
    return 100 * sum(
        share * abs(accuracy - confidence) for _, confidence, accuracy, share in _bins(log_probs, labels, bins)
    )


def plot_reliability(log_probs: Tensor, labels: Tensor, bins: int = 15) -> Figure:
    """Accuracy against confidence in each bin; on the diagonal, answers are right as often as the network says."""
    centre, confidence, accuracy, share = zip(*_bins(log_probs, labels, bins), strict=True)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5, 5.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    upper.plot([0, 1], [0, 1], color=ORIGINAL, linestyle="--", linewidth=1, label="as often right as it says")
    upper.plot(confidence, accuracy, color=TRAIN, marker="o", label="the network")
    error = expected_calibration_error(log_probs, labels, bins)
    upper.set(ylabel="share of right answers", ylim=(0, 1.02), title=f"Expected calibration error {error:.1f} %")
    upper.legend(frameon=False)
    lower.bar(centre, share, width=0.9 / bins, color=TRAIN)
    lower.set(xlabel="probability of the answer", ylabel="share of images", xlim=(0, 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    plt.close(figure)
    return figure


def _bins(log_probs: Tensor, labels: Tensor, bins: int) -> list[tuple[float, float, float, float]]:
    """Centre, mean confidence, accuracy and share of the images of each bin of the confidence that has any."""
    confidence, answers = log_probs.exp().max(1)
    right = (answers == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    return [
        ((k + 0.5) / bins, confidence[inside].mean().item(), right[inside].mean().item(), inside.float().mean().item())
        for k in range(bins)
        if (inside := which == k).any()
    ]


def picture_grid(rows: int, columns: int, width: float, title_height: float = 0.0) -> tuple[Figure, np.ndarray]:
    """A closed figure `width` inches wide with (rows, columns) axes for square pictures, frames off."""
    cell = width / columns
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, rows * (cell + title_height) + 0.4), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    plt.close(figure)
    return figure, grid
