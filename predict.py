"""Names what is in pictures: `python predict.py photo.jpg folder/`.

From Python, `plot_answers(classify(["photo.jpg", "folder/"]))`.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dataset import CLASS_COLOURS, CLASSES, MEAN, SIZE, STD, eval_transform
from machinery.pictures import Found, PictureError, find_pictures, load_picture
from machinery.runtime import answering
from machinery.words import printable, say
from model import Net, WeightsError

__all__ = ["Answer", "PictureError", "classify", "load_picture", "plot_answers"]

BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a network says of one picture."""

    path: str
    picture: np.ndarray  # what the network saw: uint8 (size, size, 3), RGB
    probabilities: dict[str, float]  # class -> 0 to 1, the likeliest first


@torch.no_grad()
def classify(
    paths: Sequence[str | Path],
    model: nn.Module | None = None,
    errors: list[PictureError] | None = None,
    skipped: list[str] | None = None,
) -> list[Answer]:
    """What is in these pictures, in their order.

    Args:
        paths: Files, see `load_picture`; a folder stands for all files in it and its subfolders that have the suffix
            of a format that Pillow reads, in the order of their names.
        model: From float (N, 3, H, W) to (N, classes), on any device; by default, `Net` as it ships. It answers in
            eval mode and is left in the mode in which it came. Its `classes`, `size`, `mean` and `std`, where it has
            them, say what it was trained on; else that is CIFAR-10.
        errors: Takes the errors of files that cannot be read, which are then left out.
        skipped: Takes a sentence for each folder that holds files of other kinds.

    Raises:
        PictureError: A file is missing or not a picture, or a folder holds none, and no `errors` are given.
    """
    model = Net.from_pretrained() if model is None else model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    classes, size = getattr(model, "classes", None) or CLASSES, getattr(model, "size", None) or SIZE
    mean, std = getattr(model, "mean", None) or MEAN, getattr(model, "std", None) or STD
    pictures: list[tuple[str, np.ndarray]] = []
    for given in map(Path, paths):
        found = find_pictures(given) if given.is_dir() else Found([str(given)])
        if found.others and skipped is not None:
            skipped.append(f"{printable(given)}: left out {found.kinds()}, which Pillow does not read")
        faults = list(found.faults)
        for path in found.pictures:
            try:
                pictures.append((path, load_picture(path, size)))
            except PictureError as error:
                faults.append(error)
        if not found.pictures:
            faults.append(
                PictureError(
                    f"{printable(given)}: there is no picture in this folder ({found.kinds() or 'it is empty'})"
                )
            )
        if faults and errors is None:
            raise faults[0]
        if errors is not None:
            errors.extend(faults)
    to_tensor, answers = eval_transform(tuple(mean), tuple(std)), []
    with answering(model):
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            images = to_tensor(images=np.stack([picture for _, picture in batch]))["images"]  # (N, 3, size, size)
            for (path, picture), probs in zip(batch, model(images.to(device)).float().softmax(1).cpu(), strict=True):
                order = probs.argsort(descending=True).tolist()
                answers.append(Answer(path, picture, {classes[k]: probs[k].item() for k in order}))
    return answers


def plot_answers(answers: Sequence[Answer], top: int = 3) -> Figure:
    """Each picture as the network saw it, beside the probabilities of its `top` likeliest classes."""
    columns = 3
    known = {name for answer in answers for name in answer.probabilities}
    names = CLASSES if known <= set(CLASSES) else sorted(known)
    colours = dict(zip(names, itertools.cycle(CLASS_COLOURS)))
    rows = max(1, -(-len(answers) // columns))
    figure, grid = plt.subplots(
        rows, 2 * columns, figsize=(12, 2 * rows), width_ratios=(1, 1.2) * columns, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for (left, right), answer in zip(grid.reshape(-1, 2), answers, strict=False):
        left.imshow(answer.picture, interpolation="nearest")
        left.set_title(printable(Path(answer.path).name), fontsize=10, parse_math=False)
        likeliest, probabilities = zip(*list(answer.probabilities.items())[:top], strict=True)
        bars = right.barh(likeliest, probabilities, color=[colours[name] for name in likeliest])
        right.bar_label(
            bars, [f" {name} {p:.1%}" for name, p in zip(likeliest, probabilities, strict=True)], fontsize=10
        )
        right.set(xlim=(0, 1.9), ylim=(top - 0.4, -0.6))
    plt.close(figure)
    return figure


def parse_with_network(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, Net]:
    """The options, and the trained network that `--weights` names; leaves with a message if something is wrong."""
    parser.add_argument("--weights", metavar="FILE", help="model.pt of a run of yours (default: those that ship)")
    options = parser.parse_args(arguments)
    try:
        return options, Net.from_pretrained(options.weights)
    except WeightsError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Say which of the classes that a network knows is in each picture, and how probable it is.",
        epilog="Answers go to the standard output, errors to the standard error; the status is 1 if there were any.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture of any size, or a folder of them")
    parser.add_argument(
        "--top", type=int, default=3, choices=range(1, 11), metavar="N", help="classes to name (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="a list with path and probabilities of all classes")
    options, model = parse_with_network(parser, arguments)
    errors: list[PictureError] = []
    skipped: list[str] = []
    answers = classify(options.paths, model, errors, skipped)
    if options.json:
        say(json.dumps([{"path": a.path, "probabilities": a.probabilities} for a in answers], indent=1), sys.stdout)
    for answer in () if options.json else answers:
        named = list(answer.probabilities.items())[: options.top]
        say(f"{printable(answer.path)}: {', '.join(f'{name} {p:.1%}' for name, p in named)}", sys.stdout)
    for line in (*skipped, *errors):
        say(str(line), sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
