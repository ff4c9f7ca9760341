"""What a person looks at: curves, pictures, mistakes, the confusion matrix, the network's summary.

Every plot returns a matplotlib `Figure`, already closed for pyplot: a notebook shows it once, a script saves it.
"""

import contextlib
import copy
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchsummary
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from dataset import CIFAR10, SIZE
from model import Residual, receptive_field
from transforms import denormalize

TRAIN, TEST, ORIGINAL = "#0072B2", "#D55E00", "#666666"  # colour-blind safe (Okabe & Ito, 2008)
KINDS = {"stem": "#999999", "3×3": TRAIN, "dilated": "#009E73", "depthwise": "#E69F00", "pointwise": "#F0E442"}
ORIGINAL_ACCURACY = 73.20  # percent on the test set, the best of 20 epochs, of the network reimplemented here


def plot_curves(history: dict[str, list]) -> Figure:
    """Loss, accuracy in percent and learning rate against epochs, train and test (or held-out) on shared axes.

    Args:
        history: As `train.fit` returns it.
    """
    synthetic, tested_on = "synthetic" in history["data"], history["tested_on"][-1]
    epochs = history["epoch"]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(3, 3, 2), layout="constrained")
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        for part, name, colour, marker in (("train", "train", TRAIN, "o"), ("test", tested_on, TEST, "s")):
            values = history[f"{part}_{quantity}"]
            label = f"{name}, {values[-1]:.2f} {'% ' if quantity == 'accuracy' else ''}at the end"
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=label)
    if not synthetic and tested_on == "test":
        accuracy.axhline(
            ORIGINAL_ACCURACY, color=ORIGINAL, linestyle="--", linewidth=1, label=f"original, {ORIGINAL_ACCURACY:.2f} %"
        )
    loss.set(title="Loss", ylabel="negative log-likelihood (nats)", ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="accuracy (%)", ylim=(None, 100))
    rate.plot(epochs, history["lr"], color=ORIGINAL, marker="o", markersize=4)
    rate.set(title="Learning rate", ylabel="rate of the filters", ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.legend(frameon=False)
    accuracy.legend(loc="lower right", framealpha=1, edgecolor="none")
    if synthetic:
        figure.suptitle("synthetic stand-in, not CIFAR-10")
    plt.close(figure)
    return figure


def plot_samples(dataset: CIFAR10, per_class: int = 10, seed: int = 0) -> Figure:
    """Pictures of each class drawn at random, one class a row, without augmentation."""
    rng = np.random.default_rng(seed)
    labels = dataset.labels.numpy()
    figure, grid = _picture_grid(len(dataset.classes), per_class, width=8)
    for row, name, k in zip(grid, dataset.classes, range(10), strict=False):
        of_class = np.flatnonzero(labels == k)
        for axes, i in zip(row, rng.permutation(of_class)[:per_class], strict=False):
            axes.imshow(dataset.images[i].numpy(), interpolation="nearest")
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    return figure


def plot_augmentations(dataset: CIFAR10, index: int = 0, draws: int = 20) -> Figure:
    """One image as it is, then as `dataset` draws it in each of the first `draws` - 1 epochs."""
    columns = 10
    figure, grid = _picture_grid(-(-draws // columns), columns, width=10, title_height=0.25)
    pictures = [dataset[epoch, index][0] for epoch in range(draws - 1)]
    pictures = [dataset.images[index].numpy(), *denormalize(torch.stack(pictures))]
    titles = ["as it is", *(f"epoch {epoch}" for epoch in range(1, draws))]
    for axes, picture, title in zip(grid.flat, pictures, titles, strict=False):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    figure.suptitle(dataset.classes[int(dataset.labels[index])])
    return figure


def plot_misclassified(dataset: CIFAR10, log_probs: Tensor, count: int = 20) -> Figure:
    """Wrong answers, the most confident first, titled "true → predicted (p)".

    Args:
        dataset: The images, in the order of `log_probs`.
        log_probs: (N, 10), as `train.predict` returns them.
        count: How many to show at most.
    """
    probs, predicted = log_probs.exp().max(1)
    wrong = torch.nonzero(predicted != dataset.labels).flatten()
    worst = wrong[probs[wrong].argsort(descending=True, stable=True)][:count].tolist()
    columns = 5
    figure, grid = _picture_grid(max(1, -(-len(worst) // columns)), columns, width=10, title_height=0.32)
    for axes, i in zip(grid.flat, worst, strict=False):
        axes.imshow(dataset.images[i].numpy(), interpolation="nearest")
        true, answer = dataset.classes[int(dataset.labels[i])], dataset.classes[int(predicted[i])]
        axes.set_title(f"{true} → {answer} ({probs[i]:.2f})", fontsize=11)
    figure.suptitle(f"{len(wrong):,} of {len(dataset):,} wrong; the most confident")
    return figure


def plot_confusion(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """How many images of each class (row) were taken for each class (column).

    Args:
        log_probs: (N, 10), as `train.predict` returns them.
        labels: (N,), the true classes.
        classes: Their names.
    """
    n = len(classes)
    counts = torch.bincount(labels * n + log_probs.argmax(1), minlength=n * n).reshape(n, n).numpy()
    mistakes = np.where(np.eye(n, dtype=bool), 0, counts)
    figure, axes = plt.subplots(figsize=(6.6, 6), layout="constrained")
    axes.imshow(mistakes, cmap="Oranges")
    for row in range(n):
        for column in range(n):
            dark = mistakes[row, column] > 0.6 * max(1, mistakes.max())
            weight = "bold" if row == column else "normal"
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color="w" if dark else "k", weight=weight
            )
    axes.set_xticks(range(n), classes, rotation=45, ha="right")
    axes.set_yticks(range(n), classes)
    axes.set(xlabel="predicted", ylabel="true", title="Images per true and predicted class; mistakes coloured")
    plt.close(figure)
    return figure


def per_class_accuracy(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Class name -> accuracy in percent on the images of that class; NaN where there are none."""
    correct = log_probs.argmax(1) == labels
    return {name: 100 * correct[labels == k].float().mean().item() for k, name in enumerate(classes)}


def plot_per_class(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Accuracy of each class as a bar, the classes in their usual order, and the mean of all as a line."""
    accuracy = per_class_accuracy(log_probs, labels, classes)
    mean = 100 * (log_probs.argmax(1) == labels).float().mean().item()
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    bars = axes.bar(list(accuracy), list(accuracy.values()), color=TRAIN)
    axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.axhline(mean, color=TEST, linestyle="--", linewidth=1)
    low = np.nanmin(list(accuracy.values()))
    axes.set(ylabel="accuracy (%)", ylim=(max(0, low - 10), 105), title=f"Accuracy per class; {mean:.2f} % of all")
    axes.tick_params(axis="x", labelrotation=0 if classes[0] == "plane" else 45)
    plt.close(figure)
    return figure


def plot_architecture(model: nn.Module, size: int = SIZE) -> Figure:
    """The convolutions of `Net`, or of a network built of its parts, for images of (3, size, size).

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
            look = {"facecolor": KINDS[kind], "edgecolor": "k", "label": kind}
            used[kind] = axes.add_patch(Rectangle((x - drawn / 2, -height / 2), drawn, height, **look))
            axes.text(x, bottom, f"{channels}\n{height}×{width}", ha="center", va="top")
            ends[name] = x - step / 2, x + step / 2, height / 2
        right = x + step / 2
        parameters = sum(p.numel() for p in probe.get_submodule(block).parameters())
        title = f"{block.upper()}, sees {field} px\n{parameters:,} parameters"
        axes.text((left + right) / 2, 0.9 * size, title, ha="center", va="top")
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
    axes.legend(handles=list(used.values()), ncols=len(used), loc="lower center", frameon=False)
    plt.close(figure)
    return figure


def _kind(conv: nn.Conv2d) -> str:
    """What a convolution is called in the picture of the architecture."""
    if conv.groups == conv.in_channels > 1:
        return "depthwise"
    if conv.kernel_size == (1, 1):
        return "pointwise"
    return "dilated" if conv.dilation > (1, 1) else "stem" if conv.in_channels == 3 else "3×3"


def show_summary(model: nn.Module, size: int = SIZE) -> int:
    """Prints torchsummary's table for images of (3, size, size) and returns the number of parameters.

    torchsummary runs a random batch in the model's own mode, which would move BatchNorm's statistics and the random
    state; here it gets a copy on the CPU in eval mode, and the random state is put back.
    """
    probe = copy.deepcopy(model).cpu().float().eval()
    table = io.StringIO()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.redirect_stdout(table):
        torchsummary.summary(probe, (3, size, size), device="cpu")
    print(table.getvalue().rstrip())
    return sum(p.numel() for p in model.parameters())


def _picture_grid(rows: int, columns: int, width: float, title_height: float = 0.0) -> tuple[Figure, np.ndarray]:
    """A closed figure `width` inches wide with (rows, columns) axes for square pictures, frames off."""
    cell = width / columns
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, rows * (cell + title_height) + 0.4), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    plt.close(figure)
    return figure, grid
