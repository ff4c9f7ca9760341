"""CIFAR-10 as a torch Dataset with Albumentations transforms, and the data loaders."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from machinery import distributed
from machinery.config import SETS, Config
from machinery.data.augment import AUGMENTATIONS, DEFAULT_AUGMENT, PADDING, EpochSampler, fill_of
from machinery.data.images import Images, sets_in
from machinery.data.loader import UNSEEDED, DeviceLoader, Items, WorkerLoader, can_batch, check_sets, start_worker
from machinery.distributed import print_rank0
from machinery.errors import SettingError
from machinery.weights import read_weights

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
SPLIT = (
    "To keep images aside: order = torch.randperm(len(full)).tolist(); "
    "train_set, test_set = full.subset(order[n:]), full.subset(order[:n], augment=())"
)


class CIFAR10(Images):
    """`Images` of CIFAR-10, or synthetic ones, with the interface of `torchvision.datasets.CIFAR10`.

    Args:
        root: Folder of CIFAR-10, searched before $CIFAR10_ROOT and ./data.
        data: "cifar10", or "synthetic" for drawn shapes, with classes "synthetic 0" ... "synthetic 9".

    Raises DataError if CIFAR-10 is missing or damaged.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        train: bool = True,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[[int], int] | None = None,
        download: bool = True,
        *,
        data: str = "cifar10",
        **options: Any,
    ) -> None:
        from machinery.data import cifar10 as files  # noqa: PLC0415  torchvision takes a second to import

        if data not in SETS:
            raise SettingError(f"data must be 'cifar10' or 'synthetic', got {data!r}")
        real = data == "cifar10"
        images, labels = files.load_cifar10(train, root, download) if real else files.draw_synthetic(train)
        if target_transform:
            labels = np.array([target_transform(label) for label in labels.tolist()])
        classes = CLASSES if real else tuple(f"synthetic {k}" for k in range(10))
        super().__init__(images, labels, classes, transform=transform, **{"mean": MEAN, "std": STD, **options})
        self.source = data


def train_transform(
    augment: Sequence[str] = DEFAULT_AUGMENT, padding: int = PADDING, mean: Sequence[float] = MEAN
) -> "A.Compose":
    """The random part of the default transform: at least one of `AUGMENTATIONS`, in their order.

    Called with `images` uint8 (N, H, W, 3) and `draws` float64 (N, 8), uniform in [0, 1). "crop" moves an image by up
    to `padding` pixels, "cutout" fills with the colour `mean`, on the scale 0-1.
    """
    from machinery.data.transforms import random_part  # noqa: PLC0415  Albumentations takes a second to import

    return random_part(tuple(augment), padding, fill_of(mean))


def eval_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> "A.Compose":
    """The fixed part of the default transform: `images` uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32)."""
    from machinery.data.transforms import fixed_part  # noqa: PLC0415  as above

    return fixed_part(tuple(mean), tuple(std))


def denormalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """Normalised float (N, 3, H, W) -> uint8 (N, H, W, 3), RGB 0-255."""
    pixels = images.detach().cpu().float().movedim(1, -1) * torch.tensor(std) + torch.tensor(mean)
    return (pixels * 255).round().clamp(0, 255).byte().numpy()


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    seed: int | None = None,
    skip: float = 0.0,
    epochs: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008  cannot be changed
    name: str = "dataset",
) -> DeviceLoader | WorkerLoader:
    """Batches (float32 (B, 3, H, W), int64 (B,)), shuffled anew each epoch if `train`; the last may be smaller.

    The batches are the same for any number of `workers`. Inside `fit`, each process gets its share of every batch.

    Args:
        dataset: `Images`, or any other map-style Dataset of (float image (C, H, W), label); its draws from the random
            states of Python, NumPy and torch follow the seed, too.
        seed: Of order and augmentation; by default that of the dataset, or 0.
        skip: Share of the images to leave out, as in `EpochSampler`, with `epochs`.
        device: Where a `DeviceLoader` keeps and augments the images.

    Raises SettingError if the dataset has another seed, DataError if an item is not as described.
    """
    for own in sets_in(dataset):
        if own.seed is not None and seed not in (None, own.seed):
            raise SettingError(f"seed is {seed}, but {name} was made with seed={own.seed}: leave that out")
        seed = own.seed if seed is None else seed
        own.in_use = True
    size, seed, rank, ranks = len(dataset), seed or 0, distributed.rank(), distributed.world_size()  # type: ignore[arg-type]
    sampler = EpochSampler(size, seed, rank, ranks, skip=skip, epochs=epochs) if train else range(rank, size, ranks)
    if can_batch(dataset, device):
        return DeviceLoader(dataset, batch_size // ranks, sampler, device, seed, name)  # type: ignore[arg-type]
    items = Items(dataset, seed, name)
    if not items.follow_seed():
        print_rank0(f"{name}: {UNSEEDED}")
    workers = 0 if multiprocessing.current_process().daemon else workers  # the processes of a Pool may have none
    return WorkerLoader(
        items,
        batch_size // ranks,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch would draw from the state that dropout draws from
    )


def make_loaders(
    config: Config,
    device: torch.device | None = None,
    train_set: Dataset | None = None,
    test_set: Dataset | None = None,
    *,
    known: dict[str, Any] | None = None,
) -> tuple[DeviceLoader | WorkerLoader, DeviceLoader | WorkerLoader]:
    """The training loader, and the loader of the test or validation images.

    `train_set` and `test_set`, given together, replace the data in `config`. `known` is from an earlier run on a folder
    of pictures: "split" (share and seed of the validation images), "mean" and "std". Raises SettingError if a setting
    does not fit the data or the sets do not fit each other, DataError as `make_loader`.
    """
    device = device or torch.device("cpu")
    sets: dict[str, Any] = {"train_set": train_set, "test_set": test_set}
    if given := [name for name, dataset in sets.items() if dataset is not None]:
        if len(given) == 1:
            raise SettingError(f"a train_set of your own and a test_set go together, got {given[0]} alone. {SPLIT}")
        if config.holdout:
            raise SettingError(f"holdout does not split a train_set of your own, got {config.holdout}. {SPLIT}")
    else:
        make = _cifar10_sets if config.data in SETS else _folder_sets
        sets = dict(zip(sets, make(config, known or {}), strict=True))
    for name, dataset in sets.items():
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise SettingError(f"{name}: it is empty, or has no length")
        _refuse_contradictions(config, name, dataset, bool(given))
    size, ranks = len(sets["train_set"]), distributed.world_size()
    if config.batch_size > size or config.batch_size % ranks:
        raise SettingError(
            f"batch_size must be a multiple of the {ranks} processes and at most the {size} training images, got "
            f"{config.batch_size}"
        )
    check_sets(**sets, warn=print_rank0)
    workers = config.workers
    if workers is None:  # on a CPU one, for the other cores are needed to train
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(16, max(1, cores - 1)) if device.type == "cuda" else 1
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "device": device}
    length: dict[str, Any] = {"skip": config.skip, "epochs": config.epochs, "workers": workers}
    return (
        make_loader(sets["train_set"], train=True, name="train_set", **options, **length),
        make_loader(sets["test_set"], train=False, name="test_set", **options),
    )


def _cifar10_sets(config: Config, known: dict[str, Any]) -> tuple[Images, Images]:
    """CIFAR-10 or synthetic images to train and test on; with `holdout`, both from the training set."""
    source: dict[str, Any] = {"data": config.data, "root": config.data_dir, "seed": config.seed}
    if config.data == "cifar10":
        from machinery.data.cifar10 import prepare  # noqa: PLC0415  as in `CIFAR10`

        distributed.once_per_machine(lambda: prepare(config.data_dir))
    whole = CIFAR10(train=True, augment=config.augment, padding=config.padding, **source)
    if not config.holdout:
        return whole, CIFAR10(train=False, **source)
    if config.holdout >= len(whole):
        raise SettingError(f"holdout must be below the {len(whole)} training images, got {config.holdout}")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(2034040))
    validation = whole.subset(order[: config.holdout], augment=())
    validation.is_validation = True
    return whole.subset(order[config.holdout :]), validation


def _folder_sets(config: Config, known: dict[str, Any]) -> tuple[Images, Images]:
    """The pictures in the folder `config.data`, normalised like those of its initial weights."""
    from machinery.data.folder import load_image_folder  # noqa: PLC0415  for those who have pictures

    files = sum(len(names) for _, _, names in os.walk(config.data))
    share = min(config.holdout / max(files, 1), 0.99) if config.holdout else 0.2  # a fifth for validation
    share, seed = known.get("split") or (share, config.seed)
    found = load_image_folder(config.data, config.size, share, seed, print_rank0)
    if config.holdout and not found.is_validation:
        print_rank0(f"{config.data} says on which pictures to test, so holdout keeps none of the others for validation")
    print_rank0(f"pictures: {len(found.labels):,} to train on, {len(found.test_labels):,} to test on")
    scale: dict[str, Any] = {name: known[name] for name in ("mean", "std") if known.get(name)}
    if config.weights and not scale:
        saved = {} if config.weights == "pretrained" else read_weights(config.weights)
        scale = {"mean": saved.get("mean") or MEAN, "std": saved.get("std") or STD}
    scale |= {"augment": config.augment, "padding": config.padding, "seed": config.seed}
    train_set = Images(found.images, found.labels, found.classes, **scale)
    test_set = Images(found.test_images, found.test_labels, found.classes, mean=train_set.mean, std=train_set.std)
    train_set.source = test_set.source = config.data
    if found.is_validation:
        test_set.is_validation, test_set.split = True, (share, seed)
    return train_set, test_set


def _refuse_contradictions(config: Config, name: str, dataset: Any, given: bool) -> None:
    """Raises SettingError if a setting other than the default contradicts our own set."""
    for own in sets_in(dataset):
        says: dict[str, Any] = {"size": own.images.shape[1]}
        if given and own.source != "your own":
            says["data"] = own.source
        if given and name == "train_set":
            says |= {"augment": own.augment, "padding": own.padding}
        for setting, value in says.items():
            if (wanted := getattr(config, setting)) not in (getattr(Config, setting), value):
                raise SettingError(
                    f"{setting} is {wanted!r} in the settings, but {value!r} of {name}: leave the setting out, or run "
                    "again the cell that makes the sets"
                )
