"""Classifies pictures: `python predict.py photo.jpg folder/`; in Python, `plot_answers(classify(["photo.jpg"]))`."""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dataset import CLASS_COLOURS, SIZE
from machinery.checkpoint import trained_on
from machinery.data.augment import normalize
from machinery.data.folder import PictureError, find_pictures, load_pictures
from machinery.device import eval_mode
from machinery.errors import print_line, printable
from model import Net, WeightsError

BATCH = 256
TOP = 3  # classes of a picture that are named, by default


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A network's prediction for one picture."""

    path: str
    picture: np.ndarray  # what the network saw: uint8 (S, S, 3), RGB
    probabilities: dict[str, float]  # class -> 0 to 1, the likeliest first
    classes: tuple[str, ...]  # in the order of the network's outputs


def known_of(model: nn.Module, classes: Any = None, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """The `trained_on` of a network, wrapped or not, overridden by what is given; "size" is 32 by default.

    Raises ValueError if mean and std, per channel (RGB) on the scale 0-1, are unknown.
    """
    known: dict[str, Any] = {"classes": None, "size": SIZE, "mean": None, "std": None}
    for source in (trained_on(model), {"classes": classes, "mean": mean, "std": std}):
        known |= {name: value for name, value in source.items() if value is not None}
    for name, least in (("mean", 0.0), ("std", 1e-6)):
        known[name] = [float(value) for value in (() if known[name] is None else known[name])]
        if len(known[name]) != 3 or not all(least <= value <= 1 for value in known[name]):
            raise ValueError(
                f"{name} must be three numbers on the scale 0-1, by which images are normalised, got {known[name]}; "
                f"give it with --{name} R G B, or {name}= in Python"
            )
    return known


def class_names(classes: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
    """The names of a network's classes, or "class 0", "class 1" ...; ValueError if their number differs."""
    if classes is not None and not len(classes) == len(set(classes)) == outputs:
        raise ValueError(f"expected {outputs} different names of classes, one for each output, got {classes}")
    return tuple(classes or (f"class {k}" for k in range(outputs)))


@torch.no_grad()
def classify(
    paths: Sequence[str | Path], model: nn.Module | None = None, errors: list[PictureError] | None = None, **given: Any
) -> list[Answer]:
    """The predictions for these pictures, in their order.

    Args:
        paths: Files, or folders of them; a warning counts other files in these.
        model: From float (N, 3, S, S) to (N, classes), on any device, run in eval mode; by default, pretrained `Net`.
        errors: Collects those of unreadable files, which are left out; without it, the first is raised.
        given: classes, mean or std, instead of the network's own.
    """
    model = Net.from_pretrained() if model is None else model
    known = known_of(model, **given)
    if known["classes"] is None:
        warnings.warn("the classes have no names; give them with --classes, or classes= in Python", stacklevel=3)
    found = [find_pictures(path, set()) if Path(path).is_dir() else ([str(path)], [], []) for path in paths]
    files = [file for pictures, _, _ in found for file in pictures]
    faults = [error for _, _, unreadable in found for error in unreadable]
    if others := [file for _, of_other_kinds, _ in found for file in of_other_kinds]:
        kinds = printable(", ".join(sorted({Path(file).suffix.lower() or "no suffix" for file in others})))
        warnings.warn(f"left out {len(others)} files of kinds that are not read: {kinds}", stacklevel=3)
    loaded = list(zip(files, load_pictures(files, known["size"]), strict=True))
    faults += [picture for _, picture in loaded if isinstance(picture, PictureError)]
    if errors is not None:
        errors += faults
    elif faults:
        raise faults[0]
    pictures = [(file, picture) for file, picture in loaded if not isinstance(picture, PictureError)]
    if not pictures:
        return []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pixels = torch.from_numpy(np.stack([picture for _, picture in pictures]))
    images = normalize(pixels, torch.tensor(known["mean"]), torch.tensor(known["std"]))
    with eval_mode(model):
        rows = torch.cat([model(batch.to(device)).float().softmax(1).cpu() for batch in images.split(BATCH)])
    names = class_names(known["classes"], rows.shape[1])
    ranked = [dict(sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])) for row in rows.tolist()]
    return [Answer(*picture, ranks, names) for picture, ranks in zip(pictures, ranked, strict=True)]


def plot_answers(answers: Sequence[Answer], top: int = TOP) -> Figure:
    """Each picture as the network saw it, beside the probabilities of its `top` likeliest classes, at least 1."""
    rows = max(1, -(-len(answers) // 3))
    figure, grid = plt.subplots(
        rows, 6, figsize=(12, 2 * rows), width_ratios=(1, 1.2) * 3, layout="constrained", squeeze=False
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


def parse_with_network(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, Net]:
    """The options, and the network of `--weights` with its `known_of`; exits on an error."""
    parser.add_argument("--weights", metavar="FILE", help="model.pt of a run of yours (default: the pretrained ones)")
    for name in ("--mean", "--std"):
        parser.add_argument(name, nargs=3, type=float, metavar=tuple("RGB"), help="of training images, 0-1, if unknown")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the names of the classes, likewise; stands last")
    options = parser.parse_args(arguments)
    try:
        model = Net.from_pretrained(options.weights)
        model.trained_on = known_of(model, options.classes, options.mean, options.std)
        class_names(model.classes, model.fc.out_features)
    except (WeightsError, ValueError) as error:
        parser.error(str(error))
    return options, model


def main(arguments: list[str] | None = None) -> int:
    text = "Classify pictures, and print how probable the likeliest classes are; the status is 1 if one cannot be read."
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture of any size, or a folder of them")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help=f"classes to name (default: {TOP})")
    parser.add_argument("--json", action="store_true", help="a list with path and probabilities of all classes")
    options, model = parse_with_network(parser, arguments)
    errors: list[PictureError] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = classify(options.paths, model, errors)
    if options.json:
        entries = [{"path": a.path, "probabilities": a.probabilities} for a in answers]
        print_line(json.dumps(entries, indent=1), sys.stdout)
    for answer in () if options.json else answers:
        named = list(answer.probabilities.items())[: options.top]
        print_line(printable(f"{answer.path}: {', '.join(f'{name} {p:.1%}' for name, p in named)}"), sys.stdout)
    for told in (*errors, *(warning.message for warning in caught)):
        print_line(str(told), sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
