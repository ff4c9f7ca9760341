"""Labelled images in memory as a Dataset, and the facts of a Dataset."""

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from machinery.data.augment import NUMBERS, PADDING, check_augment, draws_of, fill_of, normalize, seeds_of
from machinery.errors import SettingError

UNKNOWN = ("classes", "size", "mean", "std", "augment", "padding", "seed", "transform", "digest", "items", "split")


class Images(Dataset):
    """Labelled images in memory, augmented at each access: (float32 (3, H, W) normalised, label).

    `dataset[i]` draws from torch's global random state; `dataset[epoch, i]`, as the loaders read, by (seed, epoch, i).
    Flips alternate: half of the images are mirrored in even epochs, the other half in odd ones (K. Jordan, 2024).

    Args:
        images: uint8 (N, H, W, 3), RGB 0-255.
        labels: (N,), integers from 0.
        classes: Their names, in the order of the labels.
        transform: Of Albumentations or torchvision, or a callable on uint8 (H, W, 3), copied. A uint8 result is
            normalised, a float result left as it is.
        augment: Instead, names of augmentations, see `dataset.train_transform`. Both may be set until a loader is made.
        seed: Of the augmentation, >= 0; by default, that of the loader.
        padding: Largest shift of "crop", in pixels.
        mean, std: Per channel, on the scale 0-1; by default, of these images.

    Raises SettingError if an argument is not as above, or both `transform` and `augment` are given.
    """

    source = "your own"  # "cifar10", "synthetic" or the path of a folder where they are that
    is_validation = False  # a part of what there was to train on
    split: tuple[float, int] | None = None  # share and seed with which that was taken from a folder
    in_use = False  # by a loader, whose workers have copies
    augment: tuple[str, ...] = ()
    transform: Callable[..., Any] | None = None

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int],
        classes: Sequence[str],
        *,
        transform: Callable[..., Any] | None = None,
        augment: Sequence[str] = (),
        seed: int | None = None,
        padding: int = PADDING,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.images, self.labels, self.classes = _checked(images, labels, classes)
        self.seed, self.padding = seed, padding
        own = _mean_and_std(self.images) if mean is None or std is None else ((), ())
        self.mean, self.std = tuple(own[0] if mean is None else mean), tuple(own[1] if std is None else std)
        if not len(self.mean) == len(self.std) == 3 or not all(0 <= m <= 1 for m in self.mean) or min(self.std) <= 0:
            raise SettingError(
                "mean and std must be three numbers each, on the scale 0-1, those of std above 0, got "
                f"{self.mean} and {self.std}"
            )
        self.whole = len(self.images)
        self.rows: np.ndarray = np.arange(
            self.whole
        )  # where they stand in the whole set; a subset keeps them, and so their draws
        self.augment, self.transform = augment, transform  # type: ignore[assignment]  # a tuple, and a copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks a new `augment` or `transform`."""
        if name in ("augment", "transform"):
            if self.in_use:
                raise SettingError(
                    f"{name} cannot be set once a loader was made of the set; make another, or take "
                    f"dataset.subset(range(len(dataset)), {name}=...)"
                )
            if (self.transform is not None and value) if name == "augment" else (self.augment and value is not None):
                raise SettingError("augment and transform both say what happens to an image; give one of them")
        if name == "augment":
            check_augment(value, self.padding)
            value = tuple(value)
        elif name == "transform" and value is not None:
            from machinery.data.transforms import Pipeline  # noqa: PLC0415  Albumentations takes a second to import

            self._pipeline = Pipeline(value)
            value = self._pipeline.transform
        super().__setattr__(name, value)

    @property
    def data(self) -> np.ndarray:
        """The images under torchvision's name: uint8 (N, H, W, 3), read-only."""
        view = self.images.numpy()
        view.flags.writeable = False
        return view

    @property
    def targets(self) -> tuple[int, ...]:
        """The labels under torchvision's name, read-only."""
        return tuple(self.labels.tolist())

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.classes)}

    @property
    def is_overridden(self) -> bool:
        """Whether a subclass overrides how items are read."""
        return type(self).__getitem__ is not Images.__getitem__

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        return self.read([key], self.seed or 0)[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A whole batch at once, for the DataLoader."""
        return [self[key] for key in keys] if self.is_overridden else self.read(keys, self.seed or 0)

    def read(self, keys: Sequence[int | tuple[int, int]], seed: int) -> list[tuple[Tensor, int]]:
        """The items at these indices or pairs (epoch, index), with the draws of this seed."""
        pairs = [key if isinstance(key, tuple) else (None, key) for key in keys]
        indices = [range(len(self))[int(index)] for _, index in pairs]  # -1 is the last
        images, labels = self.images[indices], self.labels[indices].tolist()
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        places = [(epoch, self.rows[index]) for (epoch, _), index in zip(pairs, indices, strict=True)]

        def drawn(table: Callable[[int, int, int], np.ndarray], fresh: Callable[[], Any]) -> list[Any]:
            return [fresh() if epoch is None else table(seed, epoch, self.whole)[row] for epoch, row in places]

        if self.transform is not None:
            seeds = list(map(int, drawn(seeds_of, lambda: torch.randint(2**62, ()))))
            changed = self._pipeline(images.numpy(), seeds)
            tensors = [normalize(i.movedim(0, -1), mean, std) if i.dtype == torch.uint8 else i for i in changed]
            return list(zip(tensors, labels, strict=True))
        if self.augment:
            from machinery.data.transforms import random_part  # noqa: PLC0415  as above

            draws = np.stack(drawn(draws_of, lambda: torch.rand(NUMBERS, dtype=torch.float64).numpy()))
            compose = random_part(self.augment, self.padding, fill_of(self.mean))
            images = torch.from_numpy(compose(images=images.numpy(), draws=draws)["images"])
        return list(zip(normalize(images, mean, std), labels, strict=True))

    def subset(
        self,
        indices: Sequence[int] | Tensor,
        augment: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
    ) -> "Images":
        """A set of these images alone, in this order; `augment` or `transform` replace its own."""
        part = copy.copy(self)
        part.in_use = False
        if augment is None and transform is None:
            augment, transform = self.augment, self.transform
        part.augment, part.transform = (), None
        part.augment, part.transform = tuple(augment or ()), transform
        part.images, part.labels, part.rows = self.images[indices], self.labels[indices], self.rows[indices]
        return part


def _checked(images: Any, labels: Any, classes: Any) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The arguments as uint8 (N, H, W, 3), int64 (N,) and a tuple; SettingError if they are anything else."""
    pixels, numbers = (part.detach().cpu().numpy() if isinstance(part, Tensor) else part for part in (images, labels))
    pixels, numbers = np.require(pixels, requirements=["C", "W"]), np.asarray(numbers)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise SettingError(f"images must be uint8 (N, H, W, 3), RGB 0-255, got {pixels.dtype} {pixels.shape}")
    if numbers.shape != (len(pixels),) or numbers.dtype.kind not in "iu":
        raise SettingError(
            f"labels must be integers, one for each of the {len(pixels)} images, got {numbers.dtype} {numbers.shape}"
        )
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise SettingError(f"classes must be the names of the classes, a sequence of strings, got {classes!r}")
    if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(classes)))):
        raise SettingError(
            f"labels must be from 0 to {len(classes) - 1}, one for each class, got {numbers[wrong[0]]} for image "
            f"{wrong[0]}"
        )
    return torch.from_numpy(pixels), torch.from_numpy(numbers.astype(np.int64)), tuple(classes)


def _mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Per channel over all images, on the scale 0-1, from a histogram to save memory."""
    values = torch.arange(256).double() / 255
    counts = torch.stack([images[..., k].flatten().bincount(minlength=256) for k in range(3)]).double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), variance.sqrt().clamp(min=1e-3).tolist()


def places_in(dataset: Any) -> list[tuple[Images, int]]:
    """For each item of a Dataset our own set and the index there, through Subset and ConcatDataset; [] for others."""
    if isinstance(dataset, Images):
        return [(dataset, index) for index in range(len(dataset))]
    if isinstance(dataset, Subset):
        places = places_in(dataset.dataset)
        return [places[index] for index in dataset.indices] if places else []
    parts = [places_in(part) for part in dataset.datasets] if isinstance(dataset, ConcatDataset) else []
    return [place for part in parts for place in part] if all(parts) else []


def sets_in(dataset: Any) -> list[Images]:
    """Our own sets in a Dataset, if it holds no others."""
    return list(dict.fromkeys(images for images, _ in places_in(dataset)))


def facts_of(dataset: Any) -> dict[str, Any]:
    """The facts of a Dataset: of our own sets all, of others the length, and classes if it has such.

    Attributes of `Images`, mean and std as lists, the transform as its repr; "length", "size" (side in pixels),
    "digest" (of images and labels), "items" (of folders, int64 (N,), a hash per image); None if unknown or mixed.
    """
    facts: dict[str, Any] = dict.fromkeys(UNKNOWN) | {"source": "your own", "is_validation": False}
    facts["length"] = len(dataset)
    if not (sets := sets_in(dataset)):
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        names: Any = getattr(dataset, "classes", None)
        is_known = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return facts | {"classes": tuple(names) if is_known else None}
    first, *others = map(_facts_of_one, sets)
    facts |= {name: value for name, value in first.items() if all(other[name] == value for other in others)}
    hashes_of = {images: _hashes(images) for images in sets}
    hashes = np.array([hashes_of[images][index] for images, index in places_in(dataset)])
    facts["digest"] = hashlib.sha256(hashes.tobytes()).hexdigest()[:16]
    if facts["source"] not in ("cifar10", "synthetic", "your own"):
        facts["items"] = torch.from_numpy(hashes)
    return facts


def _facts_of_one(images: Images) -> dict[str, Any]:
    """The facts of one of our own sets that do not depend on which images are read."""
    names = ("source", "classes", "augment", "padding", "seed", "split", "is_validation")
    facts: dict[str, Any] = dict.fromkeys(UNKNOWN) | {name: getattr(images, name) for name in names}
    image = images.images[0].movedim(-1, 0)
    if images.transform is not None:
        facts["transform"] = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(images.transform))
        image = images._pipeline([images.images[0].numpy()], [0])[0]
    if images.is_overridden:
        return facts
    scale = {"mean": list(images.mean), "std": list(images.std)} if image.dtype == torch.uint8 else {}
    return facts | scale | {"size": image.shape[1] if image.shape[1] == image.shape[2] else None}


def _hashes(images: Images) -> np.ndarray:
    """int64 (N,), a hash of each image and its label."""
    parts = zip(images.images.numpy(), images.labels.numpy(), strict=True)
    digests = (hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=8).digest() for image, label in parts)
    return np.frombuffer(b"".join(digests), np.int64)
