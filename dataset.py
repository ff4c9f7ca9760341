"""CIFAR-10 as a torch Dataset with Albumentations transforms, and the loaders that feed the training loop."""

import contextlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

# Albumentations asks the network for a newer version when it is imported; it must not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from storage import draw_synthetic, load_cifar10

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Of the 50,000 training images, per channel (RGB), on the scale 0-1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

AUGMENTATIONS = ("crop", "flip", "affine", "cutout")
DEFAULT_AUGMENT = ("crop", "flip", "cutout")
SIZE = 32  # pixels, height and width
PADDING = 4  # pixels on each side before the crop
FLIPS, ORDER, AUGMENTATION = 1, 2, 3  # stand behind the seed, so that no two uses draw the same numbers


def train_transform(augment: Sequence[str] = DEFAULT_AUGMENT, flip: float = 0.5) -> A.Compose:
    """The random part of the training transform, in the order of `AUGMENTATIONS`: uint8 HWC 32x32 -> the same.

    Args:
        augment: Any of
            "crop": pads 4 px by reflection and crops 32x32 at random, so the image moves by up to 4 px;
            "flip": mirrors left and right, with the probability `flip`;
            "affine": shifts by up to 5 %, scales by 0.9 to 1.1 and rotates by up to 10 degrees, half of the time;
            "cutout": covers one 8x8 square with the mean colour (DeVries & Taylor, 2017).
        flip: `CIFAR10` passes 0 and 1 in turn.

    Raises:
        ValueError: A name is not among these.
    """
    if isinstance(augment, str) or not set(augment) <= set(AUGMENTATIONS):
        raise ValueError(f"augment takes a sequence of names among {', '.join(AUGMENTATIONS)}, got {augment!r}")
    steps: dict[str, list[A.BasicTransform]] = {
        "crop": [
            A.PadIfNeeded(SIZE + 2 * PADDING, SIZE + 2 * PADDING, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(SIZE, SIZE),
        ],
        "flip": [A.HorizontalFlip(p=flip)],
        "affine": [
            A.Affine(
                translate_percent=(-0.05, 0.05),
                scale=(0.9, 1.1),
                rotate=(-10, 10),
                keep_ratio=True,
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.5,
            )
        ],
        "cutout": [
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(8, 8),
                hole_width_range=(8, 8),
                fill=tuple(255 * m for m in MEAN),
                p=1,
            )
        ],
    }
    chosen = [step for name in AUGMENTATIONS if name in augment for step in steps[name]]
    # Checking that image and mask have one shape costs a third of the time, and there are no masks.
    return A.Compose(chosen, strict=True, is_check_shapes=False)


def eval_transform() -> A.Compose:
    """The fixed part, after the augmentation or alone: uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32), normalised.

    Called with `images=` on a whole batch, or with `image=` on one.
    """
    return A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()], strict=True)


def denormalize(images: Tensor) -> np.ndarray:
    """Normalised float (N, 3, H, W) -> uint8 (N, H, W, 3) RGB 0-255, for people to look at."""
    images = images.detach().cpu().float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


class CIFAR10(Dataset):
    """CIFAR-10, or its synthetic stand-in, in memory: `dataset[i]` -> (float32 (3, 32, 32) normalised, label 0-9).

    The augmentation of an image depends on (seed, epoch, i) alone, never on the worker, the batch or the calls
    before. `dataset[i]` is the draw of epoch 0, and `dataset[epoch, i]` that of any other: the sampler of
    `make_loader` passes these pairs, so epochs differ without any state shared with the workers. A loader of your own
    that passes plain indices would repeat epoch 0: give it `sampler=EpochSampler(len(dataset))` instead of `shuffle`.

    Flips alternate: half of the images are mirrored in even epochs and the other half in odd ones, so two epochs in
    a row show every image from both sides, where independent draws would repeat half of them (K. Jordan, 2024).

    Args:
        train: The 50,000 training images, else the 10,000 test images.
        augment: Names of augmentations, see `train_transform`; none by default.
        data: "cifar10", or "synthetic" for the drawn stand-in (see `storage.draw_synthetic`).
        data_dir: Where CIFAR-10 is, see `storage.prepare`.
        seed: Of the augmentation, >= 0.

    Attributes:
        images: uint8 (N, 32, 32, 3), RGB 0-255. A tensor, which the workers share instead of copying.
        labels: int64 (N,).
        classes: The ten names; those of the stand-in are "synthetic 0" ... "synthetic 9".

    Raises:
        ValueError: `data` or a name in `augment` is unknown.
        storage.DataError: CIFAR-10 is missing or damaged.
    """

    def __init__(
        self,
        train: bool = True,
        augment: Sequence[str] = (),
        *,
        data: str = "cifar10",
        data_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if data not in ("cifar10", "synthetic"):
            raise ValueError(f"data must be 'cifar10' or 'synthetic', got {data!r}")
        self.augment = _alternating(augment)
        self.to_tensor = eval_transform()
        self.seed = seed
        self.classes = CLASSES if data == "cifar10" else tuple(f"synthetic {k}" for k in range(10))
        images, labels = load_cifar10(train, data_dir) if data == "cifar10" else draw_synthetic(train)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.flip_phase = np.random.default_rng((seed, FLIPS)).integers(2, size=len(images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A whole batch at once, which the DataLoader calls: one normalisation instead of one per image."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        indices = [range(len(self))[i] for _, i in pairs]  # negative ones count from the end, as in a list
        images = self.images[indices].numpy()
        if self.augment:
            images = np.stack(
                [self._draw(image, epoch, i) for image, (epoch, _), i in zip(images, pairs, indices, strict=True)]
            )
        tensors = self.to_tensor(images=images)["images"]  # (N, 3, 32, 32)
        return list(zip(tensors, self.labels[indices].tolist(), strict=True))

    def _draw(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, AUGMENTATION, epoch, index))
        augment = self.augment[(epoch + self.flip_phase[index]) % 2]
        augment.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return augment(image=image)["image"]

    def subset(self, indices: Sequence[int] | Tensor, augment: Sequence[str] = ()) -> "CIFAR10":
        """A copy that holds only these images, in this order, with its own augmentation."""
        part = object.__new__(CIFAR10)
        part.__dict__.update(self.__dict__)
        part.augment = _alternating(augment)
        part.images, part.labels = self.images[indices], self.labels[indices]
        part.flip_phase = self.flip_phase[indices]
        return part


def _alternating(augment: Sequence[str]) -> tuple[A.Compose, A.Compose] | None:
    """The transform without the flip and with it, or None if there is nothing to do."""
    return (train_transform(augment, flip=0), train_transform(augment, flip=1)) if augment else None


class EpochSampler(Sampler):
    """Every index once per epoch, in an order that depends on (seed, epoch) alone, as pairs (epoch, index).

    Each pass over it is the next epoch; set `epoch` to go to another, and `start` to leave out the first images of
    the next pass, because they were met before an interruption. Of several processes (`ranks`) each gets every
    `ranks`-th image, so that together they have all, and in each step the images that one process alone would have.
    """

    def __init__(self, size: int, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.size, self.seed, self.rank, self.ranks = size, seed, rank, ranks
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.size, self.ranks))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start, self.epoch, self.start = self.epoch, self.start, self.epoch + 1, 0
        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.size)
        return ((epoch, int(i)) for i in order[start:][self.rank :: self.ranks])


def make_loader(
    dataset: CIFAR10,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader:
    """Batches (float32 (B, 3, 32, 32), int64 (B,)): shuffled anew each epoch if `train`, else in order.

    The last batch is smaller where `batch_size` does not divide the dataset; no image is left out. The batches are
    the same for any number of workers. These live as long as the loader, so that an epoch starts at once. Of several
    processes (`ranks`, which must divide `batch_size`) each gets its share of every batch.
    """
    size = len(dataset)
    return DataLoader(
        dataset,
        batch_size // ranks,
        sampler=EpochSampler(size, dataset.seed, rank, ranks) if train else range(rank, size, ranks),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch would draw from the state that dropout draws from
    )


def end_workers(loader: DataLoader) -> None:
    """Ends the processes of a loader now. An exception would keep them, and ending them later can take a minute."""
    if loader._iterator is not None:
        with contextlib.suppress(RuntimeError):  # of one that was killed
            loader._iterator._shutdown_workers()


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes, but for the training one to answer
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # OpenCV's threads would fight those of training for the cores
