"""Names what is in pictures: `python predict.py photo.jpg folder/`.

From Python, `plot_answers(classify(["photo.jpg", "folder/"]))`.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dataset import CLASS_COLOURS, CLASSES, MEAN, SIZE, STD
from machinery.data.pictures import PictureError, find_pictures, kinds_of, load_picture, no_picture
from machinery.device import answering
from machinery.words import print_line, printable
from model import Net, WeightsError

BATCH = 256
TOP = 3  # classes of a picture that are named, by default


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a network says of one picture."""

    path: str
    picture: np.ndarray  # what the network saw: uint8 (S, S, 3), RGB
    probabilities: dict[str, float]  # class -> 0 to 1, the likeliest first
    classes: tuple[str, ...] = CLASSES  # in the order of the network's outputs


def class_names(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """The names of what a network tells apart, in the order of its outputs.

    Its own `classes` if it has any, else those of CIFAR-10 for ten outputs and "class 0", "class 1" ... for others.

    Raises:
        ValueError: Its `classes` are more or fewer than its outputs.
    """
    names = getattr(model, "classes", None) or (
        CLASSES if outputs == len(CLASSES) else tuple(f"class {k}" for k in range(outputs))
    )
    if len(names) != outputs:
        raise ValueError(f"the network's `classes` must name the {outputs} that it tells apart, got {len(names)}")
    return tuple(names)


def picture_size(model: nn.Module) -> int:
    """The side in pixels of the pictures that a network was trained on: its own `size` if it has one, else 32."""
    size = getattr(model, "size", None)
    return size if isinstance(size, int) else SIZE


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (RGB), 0-1: a network's own `mean` and `std`, else those of CIFAR-10.

    Only tuples or lists count: networks of others may have buffers or methods of these names.
    """
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if isinstance(mean, tuple | list) and isinstance(std, tuple | list):
        return tuple(mean), tuple(std)
    return MEAN, STD


def as_input(pictures: np.ndarray, model: nn.Module) -> Tensor:
    """uint8 (N, S, S, 3), RGB 0-255 -> float32 (N, 3, S, S), normalised as the network expects it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(model))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std


@torch.no_grad()
def classify(
    paths: Sequence[str | Path],
    model: nn.Module | None = None,
    errors: list[PictureError] | None = None,
    skipped: list[str] | None = None,
) -> list[Answer]:
    """What is in these pictures, in their order.

    Args:
        paths: Files, see `load_picture`; a folder stands for all files in it and its sub-folders that have the suffix
            of a format that Pillow reads, in the order of their names. Hidden ones are left out, links are followed.
        model: From float (N, 3, S, S) to (N, classes), on any device; by default, `Net` as it ships. It answers in
            eval mode and is left in the mode in which it came. What it carries decides: see `class_names`,
            `picture_size` and `normalisation`.
        errors: Takes the errors of files that cannot be read, which are then left out.
        skipped: Takes the files in folders that are of other kinds; without it, a warning counts them.

    Raises:
        PictureError: A file is missing or not a picture, or a folder holds none, and no `errors` are given.
        ValueError: The network's `classes` do not fit its outputs.
    """
    model = Net.from_pretrained() if model is None else model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pictures: list[tuple[str, np.ndarray]] = []
    others: list[str] = [] if skipped is None else skipped
    for read in _read(paths, picture_size(model), others):
        if not isinstance(read, PictureError):
            pictures.append(read)
        elif errors is None:
            raise read
        else:
            errors.append(read)
    if others and skipped is None:
        warnings.warn(_left_out(others), stacklevel=3)  # the caller's line, beyond no_grad
    answers = []
    with answering(model):
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            images = as_input(np.stack([picture for _, picture in batch]), model)  # (N, 3, S, S)
            rows = model(images.to(device)).float().softmax(1).cpu()  # (N, classes)
            names = class_names(model, rows.shape[1])
            for (path, picture), row in zip(batch, rows, strict=True):
                order = row.argsort(descending=True).tolist()
                answers.append(Answer(path, picture, {names[k]: row[k].item() for k in order}, names))
    return answers


def _read(paths: Sequence[str | Path], size: int, others: list[str]) -> Iterator[tuple[str, np.ndarray] | PictureError]:
    """Each file with its picture, or the error that it gave; `others` takes what in the folders is of other kinds."""
    for path in map(Path, paths):
        files = [str(path)]
        if path.is_dir():
            found = find_pictures(path)
            files = found.pictures
            yield from found.faults
            if files:
                others += found.others
            else:
                yield no_picture(path, found.others)
        for file in files:
            try:
                yield file, load_picture(file, size)
            except PictureError as error:
                yield error


def _left_out(others: Sequence[str]) -> str:
    return f"files left out, for their kind is not read: {len(others)} ({kinds_of(others)})"


def plot_answers(answers: Sequence[Answer], top: int = TOP) -> Figure:
    """Each picture as the network saw it, beside the probabilities of its `top` likeliest classes, at least 1."""
    columns = 3
    rows = max(1, -(-len(answers) // columns))
    figure, grid = plt.subplots(
        rows, 2 * columns, figsize=(12, 2 * rows), width_ratios=(1, 1.2) * columns, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for (left, right), answer in zip(grid.reshape(-1, 2), answers, strict=False):
        left.imshow(answer.picture, interpolation="nearest")
        left.set_title(printable(Path(answer.path).name), fontsize=10, parse_math=False)
        names, probabilities = zip(*list(answer.probabilities.items())[:top], strict=True)
        colours = [CLASS_COLOURS[answer.classes.index(name) % len(CLASS_COLOURS)] for name in names]
        bars = right.barh(range(len(names)), probabilities, color=colours)
        labels = [printable(f" {name} {p:.1%}") for name, p in zip(names, probabilities, strict=True)]
        right.bar_label(bars, labels, fontsize=10, parse_math=False)
        right.set(xlim=(0, 1.9), ylim=(top - 0.4, -0.6))
    plt.close(figure)
    return figure


def say(text: str, stream: TextIO | None) -> None:
    """Prints a line, see `print_line`; leaves with a message if it cannot be written, as on a full disk."""
    try:
        print_line(text, stream)
    except OSError as error:
        sys.exit(f"cannot write: {error.strerror}")


def parse_with_network(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, Net, tuple[str, ...]]:
    """The options, the trained network that `--weights` names, and its classes; leaves with a message if it cannot."""
    parser.add_argument("--weights", metavar="FILE", help="model.pt of a run of yours (default: those that ship)")
    options = parser.parse_args(arguments)
    try:
        model = Net.from_pretrained(options.weights)
        return options, model, class_names(model, model.fc.out_features)
    except (WeightsError, ValueError) as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Say which of a network's classes is in each picture, and how probable it is.",
        epilog="Answers go to the standard output, errors to the standard error; the status is 1 if there were any.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture of any size, or a folder of them")
    parser.add_argument("--top", type=int, metavar="N", help=f"classes to name (default: {TOP})")
    parser.add_argument("--json", action="store_true", help="a list with path and probabilities of all classes")
    options, model, names = parse_with_network(parser, arguments)
    if options.top is not None and options.top not in range(1, len(names) + 1):
        parser.error(f"argument --top: expected 1 to {len(names)}, for so many classes there are, got {options.top}")
    errors: list[PictureError] = []
    skipped: list[str] = []
    answers = classify(options.paths, model, errors, skipped)
    if options.json:
        say(json.dumps([{"path": a.path, "probabilities": a.probabilities} for a in answers], indent=1), sys.stdout)
    for answer in () if options.json else answers:
        named = list(answer.probabilities.items())[: options.top or TOP]
        line = f"{answer.path}: {', '.join(f'{name} {probability:.1%}' for name, probability in named)}"
        say(printable(line), sys.stdout)
    for unreadable in errors:
        say(str(unreadable), sys.stderr)
    if skipped:
        say(_left_out(skipped), sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
