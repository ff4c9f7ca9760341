"""CIFAR-10 as a torch Dataset with Albumentations transforms, and the loaders that feed the training loop."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from machinery import distributed
from machinery.config import Config
from machinery.data.images import Images, augmentation, hole_colour
from machinery.data.loader import DeviceLoader, start_worker
from machinery.data.sampler import AUGMENTATIONS, DEFAULT_AUGMENT, PADDING, EpochSampler
from machinery.errors import SettingError
from machinery.weights import read_weights
from machinery.words import say

if TYPE_CHECKING:
    import albumentations as A

__all__ = ["AUGMENTATIONS", "CIFAR10", "CLASSES", "DEFAULT_AUGMENT", "MEAN", "SIZE", "STD", "Images"]
__all__ += ["denormalize", "eval_transform", "make_loader", "make_loaders", "train_transform"]

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of the classes in pictures, in their order; colour-blind safe (Petroff, "Accessible color sequences", 2021).
CLASS_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
SIZE = 32  # pixels, height and width
# Of the 50,000 training images, per channel (RGB), on the scale 0-1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
HELD_OUT_SHARE = 0.2  # of a folder of pictures that does not say on which to test


class CIFAR10(Images):
    """CIFAR-10, or synthetic images, with the interface of `torchvision.datasets.CIFAR10`; see `Images`.

    Args:
        root: Where CIFAR-10 is or goes; then $CIFAR10_ROOT, then ./data are looked at, see `cifar10.prepare`.
        train: The 50,000 training images, else the 10,000 test images.
        transform: See `Images`.
        target_transform: A function of the label.
        download: Whether it may be downloaded if it is not there.
        augment: See `Images`.
        data: "cifar10", or "synthetic" for shapes that are drawn, whose classes are "synthetic 0" ... "synthetic 9".
        seed: See `Images`.
        padding: See `Images`.

    Raises:
        ValueError: As `Images` does; or `data` is unknown.
        machinery.errors.DataError: CIFAR-10 is missing or damaged.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        train: bool = True,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[[int], int] | None = None,
        download: bool = True,
        *,
        augment: Sequence[str] = (),
        data: str = "cifar10",
        seed: int = 0,
        padding: int = PADDING,
    ) -> None:
        from machinery.data import cifar10 as files  # noqa: PLC0415  torchvision takes a second to import

        if data not in ("cifar10", "synthetic"):
            raise ValueError(f"data must be 'cifar10' or 'synthetic', got {data!r}")
        real = data == "cifar10"
        images, labels = files.load_cifar10(train, root, download) if real else files.draw_synthetic(train)
        if target_transform:
            labels = np.array([target_transform(label) for label in labels.tolist()])
        classes = CLASSES if real else tuple(f"synthetic {k}" for k in range(10))
        options: dict[str, Any] = {"transform": transform, "augment": augment, "seed": seed, "padding": padding}
        super().__init__(images, labels, classes, mean=MEAN, std=STD, **options)
        self.source = data


def train_transform(
    augment: Sequence[str] = DEFAULT_AUGMENT, padding: int = PADDING, mean: tuple[float, ...] = MEAN
) -> "A.Compose":
    """The random part of the default transform; Albumentations, called with `images` and `draws`.

    Args:
        augment: At least one of "crop", "flip", "affine", "trivial", "cutout" and "corrupt", applied in this order.
        padding: By how many pixels "crop" moves an image at most, 0 to 31.
        mean: Of each channel, 0-1; the colour with which "cutout" covers.

    Raises:
        ValueError: A name is not among these, there is none, or `padding` is out of range.
    """
    return augmentation().random_part(augment, padding, hole_colour(mean))


def eval_transform(mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> "A.Compose":
    """The fixed part, after the random one or alone: uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32), normalised.

    Called with `images=` on a whole batch, or with `image=` on one.
    """
    return augmentation().fixed_part(mean, std)


def denormalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """Normalised float (N, 3, H, W) -> uint8 (N, H, W, 3) RGB 0-255, for people to look at."""
    scale, shift = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    return (
        ((images.detach().cpu().float() * scale + shift) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    )


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    skip: float = 0.0,
    epochs: int = 0,
) -> DataLoader:
    """Batches (float32 (B, 3, H, W), int64 (B,)): shuffled anew each epoch if `train`, else in order.

    The last batch is smaller where `batch_size` does not divide the dataset; but for `skip`, which with `epochs` is as
    in `EpochSampler`, no image is left out. The batches are the same for any number of workers. These live as long as
    the loader, so that an epoch starts at once. Of several processes (`ranks`, which must divide `batch_size`) each
    gets its share of every batch.

    Args:
        dataset: `Images`, or any other map-style Dataset; what that draws at random is repeated by the seed, too.
        batch_size: Of all processes together.
        train: Whether to shuffle.
        workers: Processes that prepare batches.
        pin_memory: As in DataLoader.
        seed: Of order and augmentation; `Images` have their own.
    """
    size = len(dataset)  # type: ignore[arg-type]
    seed = dataset.seed if isinstance(dataset, Images) else seed
    if multiprocessing.current_process().daemon:  # as in a Pool, whose processes may not have any of their own
        workers = 0
    return DataLoader(
        dataset if isinstance(dataset, Images) or not train else seeded(dataset, seed),
        batch_size // ranks,
        sampler=(
            EpochSampler(size, seed, rank, ranks, skip=skip, epochs=epochs) if train else range(rank, size, ranks)
        ),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch would draw from the state that dropout draws from
    )


def seeded(dataset: Dataset, seed: int) -> Dataset:
    """The dataset as `make_loader` reads it: see `machinery.data.transforms.Seeded`."""
    from machinery.data.transforms import Seeded  # noqa: PLC0415  as in `CIFAR10`

    return Seeded(dataset, seed)


def make_loaders(
    config: Config,
    device: torch.device | None = None,
    train_set: Dataset | None = None,
    test_set: Dataset | None = None,
) -> tuple[DataLoader, DataLoader]:
    """The training loader and the test loader (or that of the held-out training images) for these settings.

    On a CUDA `device` the images live there and are drawn there, where their augmentations can be: see `DeviceLoader`.

    Raises:
        SettingError: A setting does not fit the data.
        machinery.errors.DataError: CIFAR-10 is missing or damaged.
    """
    train_set, test_set = _sets(config, train_set, test_set)
    size, ranks = len(train_set), distributed.world_size()  # type: ignore[arg-type]
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        if not len(dataset):  # type: ignore[arg-type]
            raise SettingError(f"{name}: it is empty")
    if config.batch_size > size:
        raise SettingError(f"batch_size must be at most the {size} training images, got {config.batch_size}")
    # Those of the second epoch, the first that may skip.
    shorter = EpochSampler(size, skip=config.skip, epochs=config.epochs).count(1)
    if config.batch_size % ranks or any(0 < images % config.batch_size < ranks for images in (size, shorter)):
        raise SettingError(
            f"batch_size must be a multiple of the {ranks} processes and leave none of them without images in the last "
            f"batch of the {size}{f' or {shorter}' if shorter < size else ''}, got {config.batch_size}"
        )
    options: dict[str, Any] = {"rank": distributed.rank(), "ranks": ranks}
    length: dict[str, Any] = {"skip": config.skip, "epochs": config.epochs}
    if device is not None and device.type == "cuda" and all(map(DeviceLoader.can_draw, (train_set, test_set))):
        sampler = EpochSampler(size, config.seed, **options, **length)
        parts: Any = (train_set, sampler), (test_set, range(distributed.rank(), len(test_set), ranks))  # type: ignore[arg-type]
        loaders: Any = [DeviceLoader(part, config.batch_size, order, device) for part, order in parts]
        return loaders[0], loaders[1]
    options |= {"batch_size": config.batch_size, "seed": config.seed}
    options["pin_memory"] = device is not None and device.type == "cuda"
    return (
        make_loader(train_set, train=True, workers=_workers(config, options["pin_memory"]), **options, **length),
        make_loader(test_set, train=False, **options),
    )


def _workers(config: Config, gpu: bool) -> int:
    """How many processes prepare images: on a CPU one, for the others are needed to train."""
    if config.workers is not None:
        return config.workers
    return min(16, max(1, len(os.sched_getaffinity(0)) - 1)) if gpu and hasattr(os, "sched_getaffinity") else 1


def _sets(config: Config, train_set: Dataset | None, test_set: Dataset | None) -> tuple[Any, Any]:
    """What to train on and what to test on, as the settings say, or what the user brought."""
    if test_set is not None and train_set is None:
        raise SettingError("a test_set of your own needs a train_set beside it")
    if train_set is None and config.data not in ("cifar10", "synthetic"):
        return _folder_sets(config)
    source: dict[str, Any] = {"data": config.data, "root": config.data_dir, "seed": config.seed}
    if train_set is None:
        if config.data == "cifar10":
            from machinery.data.cifar10 import prepare  # noqa: PLC0415  as in `CIFAR10`

            distributed.once_per_machine(lambda: prepare(config.data_dir))
        train_set = CIFAR10(train=True, augment=config.augment, padding=config.padding, **source)
        if not config.holdout:
            return train_set, CIFAR10(train=False, **source)
    if test_set is not None:
        return train_set, test_set
    if not config.holdout:
        raise SettingError("a train_set of your own needs a test_set, or holdout, which keeps a part of it aside")
    size: int = len(train_set)  # type: ignore[arg-type]
    if config.holdout >= size:
        raise SettingError(f"holdout must be below the {size} training images, got {config.holdout}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2034040))
    inside, outside = order[config.holdout :], order[: config.holdout]
    if isinstance(train_set, Images):
        rest: Any = train_set.subset(outside)
        train_set = train_set.subset(inside, train_set.augment)
    else:
        train_set, rest = Subset(train_set, inside.tolist()), Subset(train_set, outside.tolist())
    rest.is_held_out = True  # so that `fit` calibrates by it
    return train_set, rest


def _folder_sets(config: Config) -> tuple[Images, Images]:
    """The pictures in the folder that `config.data` names, normalised as those that its weights began with."""
    from machinery.data.folder import draw_aside, load_image_folder  # noqa: PLC0415  for those who have pictures

    def tell(line: str) -> None:
        if distributed.rank() == 0:
            say(line)

    images, labels, test_images, test_labels, classes = load_image_folder(config.data, config.size, warn=tell)
    is_held_out = not len(test_labels)
    if config.holdout and not is_held_out:
        tell(f"{config.data} says on which pictures to test, so none are held out")
    if is_held_out:
        share = config.holdout / len(labels) if config.holdout else HELD_OUT_SHARE
        aside = draw_aside(labels, classes, min(share, 0.99), config.seed)
        images, test_images, labels, test_labels = images[~aside], images[aside], labels[~aside], labels[aside]
    counts = zip(classes, np.bincount(labels), np.bincount(test_labels, minlength=len(classes)), strict=True)
    shown = (f"{name} {own} and {other}" for name, own, other in counts)
    tell(f"pictures to train on and to test on: {', '.join(shown)}")
    known: dict[str, Any] = {"mean": MEAN, "std": STD} if config.weights else {}
    if config.weights and config.weights != "pretrained":
        known |= {name: value for name, value in read_weights(config.weights)["images"].items() if name in known}
    options: dict[str, Any] = {"augment": config.augment, "padding": config.padding, "seed": config.seed}
    train_set = Images(images, labels, classes, **options, **known)
    test_set = Images(test_images, test_labels, classes, mean=train_set.mean, std=train_set.std)
    test_set.is_held_out = is_held_out
    return train_set, test_set
