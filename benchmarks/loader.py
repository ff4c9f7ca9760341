"""How fast the images come: our loader beside the usual way, and beside what the training step consumes.

`python benchmarks/loader.py` needs CIFAR-10 (see the README). The usual way is that of the original: a PIL image per
item, an Albumentations pipeline per image that ends in normalisation and the tensor, torch's default collate. It is
measured with the original's augmentations and with ours, which is the fair comparison.
"""

import os
import statistics
from collections.abc import Iterable
from functools import partial

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from common import alternate, median_and_half_iqr, rate, report, training_step
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from dataset import CIFAR10, DEFAULT_AUGMENT, MEAN, SIZE, STD, make_loader
from machinery.data.cifar10 import prepare
from machinery.data.sampler import HOLE, PADDING
from model import Net
from train import Config, recipe_optimizer

ROUNDS = 9
IMAGES = 10_000
BATCH_SIZE = Config().batch_size


class UsualWay(Dataset):
    """torchvision's CIFAR-10, an image at a time: PIL, array, pipeline, tensor."""

    def __init__(self, transform: A.Compose) -> None:
        self.cifar10 = datasets.CIFAR10(prepare(), train=True)
        self.transform = transform

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.cifar10[index]
        return self.transform(image=np.array(image))["image"], label


def pipelines() -> dict[str, A.Compose]:
    """The usual way's augmentations: those of the original, in today's names, and our default ones."""
    original = [
        A.HorizontalFlip(),
        A.RandomBrightnessContrast(0.2, 0.2),
        A.Affine(translate_percent=(-0.06, 0.06), scale=(0.9, 1.1), rotate=(-15, 15), keep_ratio=True),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(2, 5), hole_width_range=(2, 5)),
    ]
    ours = [
        A.PadIfNeeded(SIZE + 2 * PADDING, SIZE + 2 * PADDING, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(SIZE, SIZE),
        A.HorizontalFlip(),
        A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(HOLE, HOLE),
            hole_width_range=(HOLE, HOLE),
            fill=tuple(255 * m for m in MEAN),
            p=1,
        ),
    ]
    end = [A.Normalize(MEAN, STD), A.ToTensorV2()]
    return {"the original's": A.Compose([*original, *end]), "our": A.Compose([*ours, *end])}


def run_through(loader: Iterable) -> None:
    for _ in loader:
        pass


def main() -> None:
    torch.manual_seed(0)
    cv2.setNumThreads(0)
    train_set = CIFAR10(train=True, augment=DEFAULT_AUGMENT)
    part = train_set.subset(range(IMAGES), DEFAULT_AUGMENT)
    usual = {
        f"the usual way, {name} augmentations": DataLoader(
            UsualWay(pipeline), BATCH_SIZE, shuffle=True, num_workers=1, persistent_workers=True
        )
        for name, pipeline in pipelines().items()
    }
    loaders = {**usual, "ours": make_loader(part, BATCH_SIZE, train=True, workers=1)}
    step = training_step(model := Net(), recipe_optimizer(model), BATCH_SIZE)
    seconds = alternate({name: partial(run_through, loader) for name, loader in loaders.items()}, ROUNDS)
    seconds["consumed by the training step alone"] = [
        s * IMAGES / BATCH_SIZE for s in alternate({"step": step}, 20)["step"]
    ]
    ours = statistics.median(seconds["ours"])
    rows = []
    for name, times in seconds.items():
        rows.append((name, *rate(IMAGES, times), f"{statistics.median(times) / ours:.1f}"))

    def step_for_each(batches: Iterable) -> None:
        for _ in batches:
            step()

    loader = loaders["ours"]
    both = {"with": lambda: step_for_each(loader), "alone": lambda: step_for_each(range(len(loader)))}
    ratios = [a / b for a, b in zip(*alternate(both, ROUNDS).values(), strict=True)]
    median, spread = median_and_half_iqr(ratios)
    report(
        "loader",
        ("one worker", "images/s", "± images/s", "ours ÷ this"),
        rows,
        step_with_loader_over_step_alone=f"{median:.3f} ± {spread:.3f} (n = {len(ratios)})",
    )


if __name__ == "__main__":
    main()
