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

from dataset import AUGMENTATIONS, CLASS_COLOURS, DEFAULT_AUGMENT, SIZE, Images, denormalize
from machinery.plots import (
    ORIGINAL,
    TEST,
    TRAIN,
    draw_architecture,
    expected_calibration_error,
    picture_grid,
    plot_attention,
    plot_reliability,
)
from model import Residual, receptive_field

__all__ = ["expected_calibration_error", "per_class_accuracy", "plot_architecture", "plot_attention"]
__all__ += ["plot_augmentations", "plot_confusion", "plot_curves", "plot_misclassified", "plot_per_class"]
__all__ += ["plot_reliability", "plot_samples", "show_summary"]

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
        figure.suptitle("synthetic images, not CIFAR-10")
    plt.close(figure)
    return figure


def plot_samples(dataset: Images, per_class: int = 8, seed: int = 0) -> Figure:
    """Pictures of each class drawn at random, one class a row, without augmentation."""
    rng = np.random.default_rng(seed)
    labels = dataset.labels.numpy()
    figure, grid = picture_grid(len(dataset.classes), per_class, width=8)
    for row, name, k in zip(grid, dataset.classes, range(10), strict=False):
        of_class = np.flatnonzero(labels == k)
        for axes, i in zip(row, rng.permutation(of_class)[:per_class], strict=False):
            axes.imshow(dataset.images[i].numpy(), interpolation="nearest")
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
        row[0].add_patch(
            Rectangle((-0.1, 0), 0.05, 1, transform=row[0].transAxes, color=CLASS_COLOURS[k], clip_on=False)
        )
    return figure


def plot_augmentations(dataset: Images, augment: Sequence[str] = DEFAULT_AUGMENT, index: int = 0) -> Figure:
    """What is done to image `index` in the first seven epochs: a row for each augmentation, the last for `augment`."""
    epochs = 7
    rows = {name: (name,) for name in AUGMENTATIONS} | {"\n".join(augment): augment}
    figure, grid = picture_grid(len(rows), 1 + epochs, width=8)
    for row, (name, names) in zip(grid, rows.items(), strict=True):
        one = dataset.subset([index], names)
        drawn = denormalize(torch.stack([one[epoch, 0][0] for epoch in range(epochs)]))
        for axes, picture in zip(row, (dataset.images[index].numpy(), *drawn), strict=True):
            axes.imshow(picture, interpolation="nearest")
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    for axes, title in zip(grid[0], ("as it is", *(f"epoch {epoch + 1}" for epoch in range(epochs))), strict=True):
        axes.set_title(title, fontsize=11)
    return figure


def plot_misclassified(dataset: Images, log_probs: Tensor, count: int = 20) -> Figure:
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
    figure, grid = picture_grid(max(1, -(-len(worst) // columns)), columns, width=10, title_height=0.32)
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

    Raises:
        ValueError: There are more or fewer names than outputs.
    """
    n = len(classes)
    if n != log_probs.shape[1]:
        raise ValueError(f"classes must name the {log_probs.shape[1]} outputs of the network, got {n} names")
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
    bars = axes.bar(list(accuracy), list(accuracy.values()), color=CLASS_COLOURS)
    axes.bar_label(bars, fmt="%.1f", fontsize=9, bbox={"facecolor": "w", "edgecolor": "none", "pad": 0.5}, padding=1)
    axes.axhline(mean, color="k", linestyle="--", linewidth=1)
    low = max(0, 5 * int(np.nanmin(list(accuracy.values())) // 5 - 1))
    axes.set(ylabel="accuracy (%)", ylim=(low, 101.5), title=f"Accuracy per class; {mean:.2f} % of all")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", labelrotation=0 if classes[0] == "plane" else 45)
    plt.close(figure)
    return figure


def plot_architecture(model: nn.Module, size: int = SIZE) -> Figure:
    """The convolutions of `Net`, or of a network of blocks like its own, for images of (3, size, size).

    Each is as tall as its output after pooling and as wide as that has channels; numbers below are channels and pixels.
    Above each block stand its parameters and the receptive field at its end; arrows are shortcuts.
    """
    shortcuts = [name for name, layer in model.named_modules() if isinstance(layer, Residual)]
    return draw_architecture(model, size, receptive_field(model), shortcuts)


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
