"""Batches: of our own sets on the device; of others by torch's DataLoader, from checked items."""

import contextlib
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from machinery.data.augment import (
    IN_BATCHES,
    TRANSFORM,
    EpochSampler,
    augmented,
    draws_of,
    fill_of,
    normalize,
    random_states,
)
from machinery.data.images import Images
from machinery.errors import DataError, SettingError

TRIED = 64  # images of each set, by which `check_sets` compares them
READ_TWICE = 8  # items
UNSEEDED = (
    "items that are read twice with the same random states differ, so their draws do not follow the seed: runs will "
    "not repeat, and workers may repeat one another. If an Albumentations pipeline draws there, hand it over as "
    "transform= of Images, or call, each time before it, self.transform.set_random_seed(int(torch.randint(2**31, ())))"
)


class ItemError(DataError):
    """An item of a Dataset is unfit for training; the message names set and index."""

    def __init__(self, message: str) -> None:
        # From a worker, torch hands it on with the traceback before it.
        super().__init__(message.rpartition("ItemError: ")[2].strip())


def can_batch(dataset: Any, device: torch.device) -> bool:
    """Whether `DeviceLoader` takes it: one of our own sets, not overridden, with room for it if on a GPU."""
    if not isinstance(dataset, Images) or dataset.is_overridden or dataset.transform is not None:
        return False
    has_room = device.type != "cuda" or dataset.images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    return has_room and IN_BATCHES.issuperset(dataset.augment)


class DeviceLoader:
    """Batches of a set on the device: float32 (B, 3, H, W) in channels_last, labels int64 (B,).

    The uint8 images move there once, and are augmented as `Images` does, bit for bit.
    """

    def __init__(
        self,
        dataset: Images,
        share: int,
        sampler: EpochSampler | range,
        device: torch.device,
        seed: int = 0,
        name: str = "dataset",
    ) -> None:
        self.dataset, self.share, self.sampler, self.seed, self.name = dataset, share, sampler, seed, name
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))
        self.fill = torch.tensor(fill_of(dataset.mean), dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.share)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sampler, own = self.sampler, self.dataset
        epoch, indices = sampler.next_epoch() if isinstance(sampler, EpochSampler) else (0, np.array(sampler))
        numbers = draws_of(self.seed, epoch, own.whole)[own.rows[indices]]
        order, draws = (torch.from_numpy(values).to(self.images.device) for values in (indices, numbers))
        for start in range(0, len(indices), self.share):
            part = order[start : start + self.share]
            drawn = draws[start : start + self.share]
            images = augmented(self.images[part], drawn, own.augment, own.padding, self.fill)
            yield normalize(images, self.mean, self.std), self.labels[part]

    def set_outputs(self, outputs: int) -> None:
        """Raises ItemError if a label is not one of the network's outputs."""
        index = int(self.dataset.labels.argmax())
        _refuse_label(f"{self.name}[{index}]", int(self.dataset.labels[index]), outputs)


class Items(Subset):
    """Any map-style Dataset, read by pairs (epoch, index), with draws that follow (seed, epoch, index).

    ItemError if an item is not (float image (C, H, W), integer label below `outputs`), or shapes differ.
    """

    shape: tuple[int, ...] | None = None
    outputs: int | None = None

    def __init__(self, dataset: Any, seed: int = 0, name: str = "dataset") -> None:
        super().__init__(dataset, range(len(dataset)))
        self.seed, self.name = seed, name
        self.own = dataset if isinstance(dataset, Images) and not dataset.is_overridden else None
        self.shape = tuple(self[0][0].shape)

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Any]) -> list[tuple[Tensor, int]]:
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        if self.own:
            items: list[Any] = self.own.read(pairs, self.seed)
        else:
            items = []
            with random_states() as set_to:
                for pair in pairs:
                    mixed = np.random.SeedSequence((self.seed, TRANSFORM, *pair)).generate_state(1, np.uint64)[0]
                    set_to(int(mixed) >> 2)
                    items.append(self.dataset[pair[1]])
        return [self._checked(item, index) for item, (_, index) in zip(items, pairs, strict=True)]

    def _checked(self, item: Any, index: int) -> tuple[Tensor, int]:
        """The image as float32, and the label as an int."""
        where = f"{self.name}[{index}]"
        image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
            label = label.item()
        if isinstance(image, Tensor) and image.dtype == torch.uint8:
            raise ItemError(
                f"{where}: the image is uint8; the Dataset must return it as float, scaled and normalised: "
                "(image / 255 - mean) / std, with mean and std of shape (3, 1, 1)"
            )
        is_image = isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()
        if not is_image or not isinstance(label, int):
            kinds = [
                f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor | np.ndarray) else type(part).__name__
                for part in (image, label)
            ]
            found = " and ".join(kinds)
            raise ItemError(f"{where}: an item must be (float tensor (C, H, W), integer label), got {found}")
        if self.shape and image.shape != self.shape:
            raise ItemError(f"{where}: the image is {tuple(image.shape)}, that of {self.name}[0] is {self.shape}")
        _refuse_label(where, label, self.outputs)
        return image.float(), label

    def follow_seed(self) -> bool:
        """Whether items read twice with the same random states are equal; named augmentations always are."""
        if self.own and self.own.transform is None:
            return True
        once, again = (self.__getitems__(_spread(len(self), READ_TWICE)) for _ in range(2))
        return all(torch.equal(a, b) and label == same for (a, label), (b, same) in zip(once, again, strict=True))


def _refuse_label(where: str, label: int, outputs: int | None) -> None:
    """Raises ItemError if the label is negative or not below the network's outputs."""
    if label < 0 or (outputs is not None and label >= outputs):
        allowed = "labels count from 0" if outputs is None else f"the network has {outputs} outputs, 0 to {outputs - 1}"
        raise ItemError(f"{where}: the label is {label}, but {allowed}")


def _spread(count: int, tried: int) -> list[int]:
    """At most `tried` indices below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(tried, count)).astype(int).tolist()


class WorkerLoader(DataLoader):
    """A DataLoader of `Items`."""

    dataset: Items

    @property
    def share(self) -> int:
        """The number of images in a batch of this process."""
        return self.batch_size or 0

    def __iter__(self) -> Any:
        try:
            return super().__iter__()
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # of workers that are spawned
            raise SettingError(
                f"{self.dataset.name} cannot be sent to the workers ({error}): define what it holds in a .py file and "
                "import it, or take workers = 0, which gives the same"
            ) from error

    def set_outputs(self, outputs: int) -> None:
        """Makes labels beyond the network's outputs raise ItemError when read."""
        self.dataset.outputs = outputs


def end_workers(loader: object) -> None:
    """Ends the worker processes now: an exception would keep them, and ending them later can take a minute."""
    if iterator := getattr(loader, "_iterator", None):
        with contextlib.suppress(RuntimeError):  # of one that was killed
            iterator._shutdown_workers()


def start_worker(worker: int) -> None:
    """Sets up a worker process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes, but for the training one to answer
        signal.signal(number, signal.SIG_IGN)
    import cv2  # noqa: PLC0415  whoever has no workers does not wait for it

    cv2.setNumThreads(0)  # its threads would fight those of training for the cores


def check_sets(train_set: Any, test_set: Any, warn: Callable[[str], object] = print) -> None:
    """Compares some images of both sets; `warn` gets a line if a transform leaves all of them unchanged.

    SettingError if they cannot be normalised alike (spreads differ by a factor over 3, or means by over 2 spreads).
    """
    values = []
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        items = Items(dataset, name=name)
        places = _spread(len(items), TRIED)
        images = torch.stack([image for image, _ in items.__getitems__(places)])
        values.append((float(images.mean()), float(images.std())))
        if items.own and items.own.transform is not None:
            plain = normalize(items.own.images[places], torch.tensor(items.own.mean), torch.tensor(items.own.std))
            if torch.equal(images, plain):
                warn(f"{name}: its transform left all of the {len(places)} images that were tried as they were")
    (mean, spread), (other, other_spread) = values
    if max(spread, other_spread) > 3 * min(spread, other_spread) or abs(mean - other) > 2 * min(spread, other_spread):
        raise SettingError(
            f"the images of train_set have mean {mean:.3g} and standard deviation {spread:.3g}, those of test_set "
            f"{other:.3g} and {other_spread:.3g}: they are not normalised alike. What a transform returns as uint8 is "
            "scaled and normalised, what it returns as float is taken to be finished"
        )
