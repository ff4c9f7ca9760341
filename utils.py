"""Plots: curves, pictures, mistakes, the confusion matrix; and the network's summary.

Every plot returns a matplotlib `Figure`. `log_probs` (N, classes) and `labels` (N,) are from `train.predict` with a
loader that does not shuffle; others raise ValueError.
"""

import contextlib
import copy
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchsummary
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from dataset import AUGMENTATIONS, SIZE, Images, denormalize
from machinery import plots
from machinery.plots import REFERENCE, TRAIN, draw_pictures, plot_attention, shortened, styled
from model import Residual, receptive_field

__all__ = ["expected_calibration_error", "per_class_accuracy", "plot_architecture", "plot_attention"]
__all__ += ["plot_augmentations", "plot_confusion", "plot_curves", "plot_misclassified", "plot_per_class"]
__all__ += ["plot_reliability", "plot_samples", "show_summary"]

ORIGINAL_ACCURACY = 73.20  # percent on the test set, the best of 20 epochs, of the network reimplemented here


@styled
def plot_curves(history: dict[str, list], rate: str = "learning rate") -> Figure:
    """Plots the `history` of `train.fit`; `rate` names the learning rate, such as "Muon learning rate"."""
    epochs, tested_on = history["epoch"], history["tested_on"][-1]
    figure, (loss, accuracy, lr) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(3, 3, 2), layout="constrained")
    for axes, quantity, unit in ((loss, "loss", ""), (accuracy, "accuracy", " %")):
        for part, name, colour, marker in (("train", "train", TRAIN, "o"), ("test", tested_on, plots.TEST, "s")):
            values = history[f"{part}_{quantity}"]
            label = f"{name}, {values[-1]:.2f}{unit} at the end"
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=label)
    lr.plot(epochs, history["lr"], color=REFERENCE, marker="o", markersize=4)
    loss.legend()
    loss.set(title="Loss", ylabel="negative log-likelihood (nats)", ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="accuracy (%)", ylim=(None, 100))
    lr.set(title="Learning rate", ylabel=rate, ylim=(0, None))
    if {*history["data"]} == {"cifar10"} and tested_on == "test":
        text = f"course exercise reimplemented here,\nbest of 20 epochs: {ORIGINAL_ACCURACY:.2f} %"
        accuracy.axhline(ORIGINAL_ACCURACY, color=REFERENCE, linestyle="--", linewidth=1, label=text)
    accuracy.legend()
    if "synthetic" in history["data"]:
        figure.suptitle("synthetic images, not CIFAR-10")
    for axes in (loss, accuracy, lr):
        axes.set(xlabel="epoch", xticks=np.linspace(epochs[0], epochs[-1], 5).round())
        axes.grid(alpha=0.3)
    return figure


@styled
def plot_samples(dataset: Images, per_class: int = 4, seed: int = 0) -> Figure:
    """Random images of each of the first 20 classes, without augmentation."""
    rng, labels, classes = np.random.default_rng(seed), dataset.labels.numpy(), dataset.classes[:20]
    columns: list[list[plots.Tile]] = []
    for k, name in enumerate(classes):
        drawn = rng.permutation(np.flatnonzero(labels == k))[:per_class]
        pictures = [*dataset.images[drawn].numpy(), *[None] * (per_class - len(drawn))]
        columns.append([(shortened(name) if row == 0 else "", picture) for row, picture in enumerate(pictures)])
    rows = [row for start in range(0, len(columns), 10) for row in zip(*columns[start : start + 10], strict=True)]
    is_part = len(classes) < len(dataset.classes)
    heading = f"The first {len(classes)} of {len(dataset.classes)} classes" if is_part else ""
    return draw_pictures(rows, 1.1, heading=heading)


@styled
def plot_augmentations(dataset: Images, index: int = 0) -> Figure:
    """One image under each augmentation, in the first epochs that change it; last, under those of `dataset`."""
    original = dataset.images[index].numpy()
    readers = [(dataset.subset([index], (name,)), 0) for name in AUGMENTATIONS] + [(dataset, index)]
    rows: list[list[plots.Tile]] = []
    for images, i in readers:
        drawn = torch.stack([images[epoch, i][0] for epoch in range(20)])
        pictures = [original, *denormalize(drawn, dataset.mean, dataset.std)]
        distinct = {picture.tobytes(): picture for picture in pictures}
        rows.append([("", picture) for picture in distinct.values()][:7])
    own = "\n".join(dataset.augment) or ("its transform" if dataset.transform else "none")
    return draw_pictures(rows, 1.1, [*AUGMENTATIONS, f"this dataset:\n{own}"], "The original, and draws of training")


@styled
def plot_misclassified(dataset: Images, log_probs: Tensor, labels: Tensor, count: int = 20) -> Figure:
    """The `count` most confident mistakes, with the probabilities of the predicted and the true class."""
    plots.check_order(dataset, log_probs, labels)
    probs, predicted = log_probs.exp().max(1)
    wrong = torch.nonzero(predicted != labels).flatten()
    tiles: list[plots.Tile] = []
    for i in wrong[probs[wrong].argsort(descending=True, stable=True)][:count].tolist():
        true, wrongly = (shortened(dataset.classes[k], 10) for k in (labels[i], predicted[i]))
        title = f"{true} → {wrongly}\n{probs[i]:.4f} ({true} {log_probs[i, labels[i]].exp():.2g})"
        tiles.append((title, dataset.images[i].numpy()))
    rows = [tiles[start : start + 5] for start in range(0, len(tiles), 5)]
    heading = f"{len(wrong):,} of {len(dataset):,} wrong; the most confident, with their probabilities"
    return draw_pictures(rows, 1.9, heading=heading if tiles else f"None of {len(dataset):,} images is misclassified")


@styled
def plot_confusion(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Images of each true class (row) by predicted class (column), with numbers for up to 20 classes."""
    plots.check_predictions(log_probs, labels, classes)
    n = len(classes)
    counts = torch.bincount(labels * n + log_probs.argmax(1), minlength=n * n).reshape(n, n).numpy()
    mistakes = np.where(np.eye(n, dtype=bool), 0, counts)
    side = np.clip(2 + 0.45 * n, 4.5, 14)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    colours = LinearSegmentedColormap.from_list("mistakes", [plt.rcParams["axes.facecolor"], plots.TEST])
    image = axes.imshow(mistakes, cmap=colours, vmin=0, vmax=max(1, mistakes.max()))
    if n <= 20:
        for row, column in np.ndindex(n, n):
            axes.text(
                column, row, counts[row, column], ha="center", va="center", alpha=1 if counts[row, column] else 0.3
            )
    else:
        figure.colorbar(image, shrink=0.5, ticks=MaxNLocator(integer=True), label="mistaken images")
    axes.set_xticks(range(n), [shortened(name, 20) for name in classes], rotation=90)
    axes.set_yticks(range(n), [shortened(name, 20) for name in classes])
    axes.tick_params(labelsize=min(10, 600 / n))
    axes.set(xlabel="predicted", ylabel="true", title="Images, mistakes coloured")
    return figure


def per_class_accuracy(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Class name -> accuracy in percent; NaN for classes without images."""
    correct = log_probs.argmax(1) == labels
    return {name: 100 * correct[labels == k].float().mean().item() for k, name in enumerate(classes)}


@styled
def plot_per_class(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Accuracy of each class that has images against the overall one; of over 30, the 15 best and worst."""
    plots.check_predictions(log_probs, labels, classes)
    accuracy = per_class_accuracy(log_probs, labels, classes)
    ranking = sorted((name for name in accuracy if accuracy[name] >= 0), key=lambda name: accuracy[name])
    shown = ranking if len(ranking) <= 30 else ranking[:15] + ranking[-15:]
    values, overall = [accuracy[name] for name in shown], 100 * (log_probs.argmax(1) == labels).float().mean().item()
    figure, axes = plt.subplots(figsize=(7, 1.3 + 0.27 * len(shown)), layout="constrained")
    axes.hlines(range(len(shown)), overall, values, color=TRAIN, alpha=0.5)
    axes.plot(values, range(len(shown)), "o", color=TRAIN)
    axes.axvline(overall, color=REFERENCE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{shortened(name, 30)}  {accuracy[name]:.1f}" for name in shown])
    axes.set(xlabel="accuracy (%)", xlim=(None, min(axes.get_xlim()[1], 101)), ylim=(-0.7, len(shown) - 0.3))
    which = f"{len(ranking)} classes" if shown == ranking else f"the 15 best and 15 worst of {len(ranking)} classes"
    axes.set_title(f"{overall:.2f} % of all images right; {which}")
    axes.grid(alpha=0.3, axis="x")
    return figure


def expected_calibration_error(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """In percent: |confidence - accuracy| over bins of equal width, weighted by images.

    Naeini et al., 2015; Guo et al., 2017.
    """
    _, count, confidence, accuracy = _bins(log_probs, labels, bins)
    return 100 * float((count * np.abs(accuracy - confidence)).sum() / count.sum())


@styled
def plot_reliability(log_probs: Tensor, labels: Tensor, bins: int = 15) -> Figure:
    """Accuracy by confidence, in bins with 95 % intervals (Agresti & Coull, 1998), and the images per bin."""
    centre, count, confidence, accuracy = _bins(log_probs, labels, bins)
    smoothed = (accuracy * count + 2) / (count + 4)
    half = 2 * np.sqrt(smoothed * (1 - smoothed) / (count + 4))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 6), height_ratios=(3, 1), layout="constrained")
    upper.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.vlines(confidence, smoothed - half, smoothed + half, color=TRAIN)
    upper.plot(confidence, accuracy, "o", color=TRAIN, label="network, 95 % interval")
    error = expected_calibration_error(log_probs, labels, bins)
    upper.set(ylabel="accuracy", xlim=(0, 1.01), ylim=(-0.02, 1.02), title=f"Expected calibration error {error:.1f} %")
    upper.legend()
    lower.bar_label(lower.bar(centre, count, width=0.9 / bins, color=TRAIN), fmt="{:,.0f}", fontsize=7)
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="images", xlim=(0, 1.01))
    lower.set(yscale="log", ylim=(0.5, 4 * count.max()))
    return figure


def _bins(log_probs: Tensor, labels: Tensor, bins: int) -> tuple[np.ndarray, ...]:
    """Centre, number of images, mean confidence and accuracy of each nonempty bin of confidence."""
    confidence, predicted = (part.numpy() for part in log_probs.double().exp().max(1))
    which = np.minimum(confidence * bins, bins - 1).astype(int)
    filled, count = np.unique(which, return_counts=True)
    sums = (np.bincount(which, values)[filled] for values in (confidence, predicted == labels.numpy()))
    return (filled + 0.5) / bins, count, *(total / count for total in sums)


def plot_architecture(model: nn.Module, size: int = SIZE) -> Figure:
    """The convolutions of `Net`, or of a network of similar blocks, for images of (3, size, size)."""
    shortcuts = [name for name, layer in model.named_modules() if isinstance(layer, Residual)]
    return plots.draw_architecture(model, size, receptive_field(model), shortcuts)


def show_summary(model: nn.Module, size: int = SIZE) -> int:
    """Prints torchsummary's table for images of (3, size, size), and returns the number of parameters.

    A line notes a wrong total or a failure of torchsummary.
    """
    count, table = sum(p.numel() for p in model.parameters()), io.StringIO()
    try:
        probe = copy.deepcopy(model).cpu().float().eval()  # for it runs a random batch
        with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.redirect_stdout(table):
            torchsummary.summary(probe, (3, size, size), device="cpu")
        print(table.getvalue().rstrip())
    except Exception as error:  # of any kind: attention, outputs that are no tensors, other sizes of images
        print(f"torchsummary has no table of this {type(model).__name__}: {type(error).__name__}, {error}")
    if f"Total params: {count:,}\n" not in table.getvalue():
        print(f"{count:,} parameters; a table counts a shared layer twice and what stands outside of layers not at all")
    return count
