"""Labelled images in memory, as a Dataset."""

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from machinery.data.sampler import DRAWN_FOR, PADDING, draws_of, seeds_of


class Images(Dataset):
    """Labelled images in memory, augmented anew whenever they are read: (float32 (3, H, W) normalised, label).

    `dataset[i]` draws its augmentation from torch's global random state, so that in any loop or DataLoader every epoch
    differs, and `torch.manual_seed` repeats them all. `dataset[epoch, i]` draws what (seed, epoch, i) say, never mind
    the worker, the batch or the calls before: the loader of `dataset.make_loader` reads it so.

    Among the named augmentations flips alternate: half of the images are mirrored in even epochs and the other half in
    odd ones, so two epochs in a row show every image from both sides, where independent draws would repeat half of
    them (K. Jordan, 2024).

    Args:
        images: uint8 (N, H, W, 3), RGB 0-255.
        labels: (N,), integers from 0.
        classes: Their names, in the order of the labels.
        transform: Any of Albumentations or torchvision, or a callable on uint8 (H, W, 3); what it lacks to a
            normalised float tensor is done afterwards. See `pipeline.Pipeline`.
        augment: In its place, names of augmentations, see `dataset.train_transform`; none by default.
        seed: Of the augmentation, >= 0.
        padding: By how many pixels the augmentation "crop" moves an image at most.
        mean: Of each channel, on the scale 0-1; by default, of these images.
        std: Likewise.

    Attributes:
        images: uint8 (N, H, W, 3). A tensor, which the workers share instead of copying.
        labels: int64 (N,).
        classes: As given.

    Raises:
        ValueError: A name in `augment` is unknown, `padding` is out of range where `augment` is given, or `transform`
            is given besides.
    """

    source = "your own"  # "cifar10" or "synthetic" where they are that
    is_held_out = False  # from training

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        classes: Sequence[str],
        *,
        transform: Callable[..., Any] | None = None,
        augment: Sequence[str] = (),
        seed: int = 0,
        padding: int = PADDING,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        self.classes, self.seed, self.padding = tuple(classes), seed, padding
        pixels = self.images.view(-1, 3).double() / 255 if mean is None or std is None else torch.empty(0, 3)
        self.mean: tuple[float, ...] = tuple(pixels.mean(0).tolist() if mean is None else mean)
        self.std: tuple[float, ...] = tuple(pixels.std(0).clamp(min=1e-3).tolist() if std is None else std)
        self._whole = len(self.images)
        self._rows: np.ndarray = np.arange(self._whole)  # where they stand in the whole set; a subset keeps them
        self._transform: Callable[..., Any] | None = None
        self.augment = augment  # type: ignore[assignment]  # properties, below
        self.transform = transform

    @property
    def augment(self) -> tuple[str, ...]:
        """Names of augmentations; may be set."""
        return self._augment

    @augment.setter
    def augment(self, names: Sequence[str]) -> None:
        if names:
            if self._transform is not None:
                raise ValueError("augment and transform both say what happens to an image; give one of them")
            names = names if isinstance(names, str) else tuple(names)
            self._random_part(names)  # refuses what is wrong
        self._augment = tuple(names)

    @property
    def transform(self) -> Callable[..., Any] | None:
        """What a user brought in place of `augment`; may be set."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        if transform is not None and self._augment:
            raise ValueError("augment and transform both say what happens to an image; give one of them")
        if transform is not None:
            from machinery.data.transforms import Pipeline  # noqa: PLC0415  as in `augmentation`

            self._pipeline = Pipeline(transform, self.mean, self.std)
        self._transform = transform

    @property
    def data(self) -> np.ndarray:
        """The images as torchvision has them: uint8 (N, H, W, 3)."""
        return self.images.numpy()

    @property
    def targets(self) -> list[int]:
        """The labels as torchvision has them."""
        return self.labels.tolist()

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.classes)}

    @property
    def kind(self) -> dict[str, Any]:
        """What a network has to know of them: side in pixels, and with what they are normalised."""
        return {"size": self.images.shape[1], "mean": list(self.mean), "std": list(self.std)}

    @property
    def hole_colour(self) -> tuple[int, ...]:
        """Of what "cutout" covers."""
        return hole_colour(self.mean)

    def _random_part(self, names: Sequence[str]) -> Any:
        return augmentation().random_part(names, self.padding, self.hole_colour)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A whole batch at once, which the DataLoader calls: one normalisation instead of one per image."""
        if any(isinstance(key, slice) for key in keys):
            raise TypeError("a slice is not read at once; take [dataset[i] for i in range(...)], or dataset.subset")
        epochs = [key[0] if isinstance(key, tuple) else None for key in keys]
        indices = [range(len(self))[key[1] if isinstance(key, tuple) else int(key)] for key in keys]  # -1 is the last
        images, places = self.images[indices].numpy(), list(zip(epochs, self._rows[indices], strict=True))
        if self._transform is not None:
            seeds = [e if e is None else int(seeds_of(self.seed, e, self._whole)[row]) for e, row in places]
            tensors: Any = self._pipeline(images, seeds)
        else:
            if self._augment:
                draws = [
                    torch.rand(len(DRAWN_FOR), dtype=torch.float64).numpy()
                    if epoch is None
                    else draws_of(self.seed, epoch, self._whole)[row]
                    for epoch, row in places
                ]
                images = self._random_part(self._augment)(images=images, draws=np.stack(draws))["images"]
            tensors = augmentation().fixed_part(self.mean, self.std)(images=images)["images"]  # (N, 3, H, W)
        return list(zip(tensors, self.labels[indices].tolist(), strict=True))

    def draws(self, epoch: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The random numbers that these images' augmentation follows in an epoch, a row each: see `draws_of`."""
        return draws_of(self.seed, epoch, self._whole)[self._rows[indices]]

    def subset(self, indices: Sequence[int] | Tensor, augment: Sequence[str] = ()) -> "Images":
        """A copy that holds only these images, in this order, with its own choice of augmentations.

        An image keeps its draws: they depend on where it stands in the whole set.
        """
        part = copy.copy(self)
        part.transform, part.augment = None, augment  # type: ignore[assignment]
        part.images, part.labels, part._rows = self.images[indices], self.labels[indices], self._rows[indices]
        return part


def hole_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """Of the square that "cutout" covers, RGB 0-255: the mean, which is given on the scale 0-1."""
    return tuple(np.rint(255 * np.array(mean)).astype(int).tolist())


def augmentation() -> ModuleType:
    """The module of that name, which brings Albumentations: a second that only those wait for who read images."""
    from machinery.data import augment  # noqa: PLC0415

    return augment
