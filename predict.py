"""Names what is in pictures: `python predict.py photo.jpg folder/`.

From Python, `plot_answers(classify(["photo.jpg", "folder/"]))`.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn

from dataset import CLASS_COLOURS, CLASSES, SIZE, eval_transform
from machinery.runtime import answering
from model import Net, WeightsError

BATCH = 256
TOP = range(1, len(CLASSES) + 1)  # how many classes of a picture may be shown


class PictureError(ValueError):
    """A file is missing or not a picture; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a network says of one picture."""

    path: str
    picture: np.ndarray  # what the network saw: uint8 (32, 32, 3), RGB
    probabilities: dict[str, float]  # class -> 0 to 1, the likeliest first


def load_picture(path: str | Path) -> np.ndarray:
    """A picture file of any size and mode -> uint8 (32, 32, 3), RGB 0-255.

    Turned upright as its EXIF data say, transparent parts on white, of an animation the first image; shrunk until the
    shorter side fits, then cut to the square in the middle.

    Raises:
        PictureError: The file is missing, not a picture, or a folder.
    """
    if Path(path).is_dir():
        raise PictureError(f"{path}: there is no picture in this folder")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode in ("I", "F"):
                raise ValueError("its grey values have 32 bits and no white; save it with 8 or 16")
            if upright.mode.startswith("I;16"):  # which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(upright) / 257).astype(np.uint8))
            upright = upright.convert("RGBA")
    except FileNotFoundError as error:
        raise PictureError(f"{path}: there is no such file") from error
    except Exception as error:  # damage makes Pillow raise nearly anything
        raise PictureError(f"{path}: not a picture that can be read ({error})") from error
    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (SIZE, SIZE), Image.Resampling.BOX))


@torch.no_grad()
def classify(
    paths: Sequence[str | Path], model: nn.Module | None = None, errors: list[PictureError] | None = None
) -> list[Answer]:
    """What is in these pictures, in their order.

    Args:
        paths: Files, see `load_picture`; a folder stands for all files in it and its subfolders that have the suffix
            of a format that Pillow reads, in the order of their names.
        model: From float (N, 3, 32, 32) to (N, 10), on any device; by default, `Net` as it ships. It answers in eval
            mode and is left in the mode in which it came.
        errors: Takes the errors of files that cannot be read, which are then left out.

    Raises:
        PictureError: A file is missing or not a picture, or a folder holds none, and no `errors` are given.
    """
    model = Net.from_pretrained() if model is None else model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pictures: list[tuple[str, np.ndarray]] = []
    for path in (file for given in paths for file in files_in(Path(given))):
        try:
            pictures.append((path, load_picture(path)))
        except PictureError as error:
            if errors is None:
                raise
            errors.append(error)
    to_tensor, answers = eval_transform(), []
    with answering(model):
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            images = to_tensor(images=np.stack([picture for _, picture in batch]))["images"]  # (N, 3, 32, 32)
            for (path, picture), probs in zip(batch, model(images.to(device)).float().softmax(1).cpu(), strict=True):
                order = probs.argsort(descending=True).tolist()
                answers.append(Answer(path, picture, {CLASSES[k]: probs[k].item() for k in order}))
    return answers


def plot_answers(answers: Sequence[Answer], top: int = 3) -> Figure:
    """Each picture as the network saw it, beside the probabilities of its `top` (1 to 10) likeliest classes."""
    columns = 3
    rows = max(1, -(-len(answers) // columns))
    figure, grid = plt.subplots(
        rows, 2 * columns, figsize=(12, 2 * rows), width_ratios=(1, 1.2) * columns, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for (left, right), answer in zip(grid.reshape(-1, 2), answers, strict=False):
        left.imshow(answer.picture, interpolation="nearest")
        left.set_title(Path(answer.path).name, fontsize=10, parse_math=False)
        names, probabilities = zip(*list(answer.probabilities.items())[:top], strict=True)
        bars = right.barh(names, probabilities, color=[CLASS_COLOURS[CLASSES.index(name)] for name in names])
        right.bar_label(bars, [f" {name} {p:.1%}" for name, p in zip(names, probabilities, strict=True)], fontsize=10)
        right.set(xlim=(0, 1.9), ylim=(top - 0.4, -0.6))
    plt.close(figure)
    return figure


def files_in(path: Path) -> list[str]:
    """Those in a folder that may be pictures, by their suffixes; if there are none, or for a file, the path itself."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [str(f) for f in sorted(path.rglob("*")) if f.suffix.lower() in suffixes and f.is_file()] or [str(path)]


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
        description="Say which of the ten classes of CIFAR-10 is in each picture, and how probable it is.",
        epilog="Answers go to the standard output, errors to the standard error; the status is 1 if there were any.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture of any size, or a folder of them")
    parser.add_argument("--top", type=int, default=3, choices=TOP, metavar="N", help="classes to name (default: 3)")
    parser.add_argument("--json", action="store_true", help="a list with path and probabilities of all classes")
    options, model = parse_with_network(parser, arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # of names that it cannot print
    errors: list[PictureError] = []
    answers = classify(options.paths, model, errors)
    if options.json:
        print(json.dumps([{"path": a.path, "probabilities": a.probabilities} for a in answers], indent=1))
    for answer in () if options.json else answers:
        named = list(answer.probabilities.items())[: options.top]
        print(f"{answer.path}: {', '.join(f'{name} {probability:.1%}' for name, probability in named)}")
    for unreadable in errors:
        print(unreadable, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
