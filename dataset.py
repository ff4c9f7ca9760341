"""CIFAR-10 as a torch Dataset with Albumentations transforms, and the loaders that feed the training loop."""

import contextlib
import functools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import MAX_SKIP
from storage import draw_synthetic, load_cifar10
from transforms import DRAWN_FOR, PADDING, eval_transform, train_transform

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of the classes in pictures, in their order; colour-blind safe (Petroff, "Accessible color sequences", 2021).
CLASS_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
SIZE = 32  # pixels, height and width
FLIPS, ORDER, AUGMENTATION, SKIP = 1, 2, 3, 4  # stand behind the seed, so that no two uses draw the same numbers


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
        padding: By how many pixels the augmentation "crop" moves an image at most.

    Attributes:
        images: uint8 (N, 32, 32, 3), RGB 0-255. A tensor, which the workers share instead of copying.
        labels: int64 (N,).
        classes: The ten names; those of the stand-in are "synthetic 0" ... "synthetic 9".

    Raises:
        ValueError: `data` or a name in `augment` is unknown, or `padding` is out of range where `augment` is given.
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
        padding: int = PADDING,
    ) -> None:
        if data not in ("cifar10", "synthetic"):
            raise ValueError(f"data must be 'cifar10' or 'synthetic', got {data!r}")
        self.padding = padding
        self.augmentations = tuple(augment)
        self.augment = train_transform(augment, padding) if augment else None
        self.to_tensor = eval_transform()
        self.seed = seed
        self.classes = CLASSES if data == "cifar10" else tuple(f"synthetic {k}" for k in range(10))
        images, labels = load_cifar10(train, data_dir) if data == "cifar10" else draw_synthetic(train)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self._whole = len(images)
        self._rows: np.ndarray = np.arange(len(images))  # where they stand in the whole set; a subset keeps them

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
            rows = zip(pairs, self._rows[indices], strict=True)
            draws = np.stack([_draws(self.seed, epoch, self._whole)[row] for (epoch, _), row in rows])
            images = self.augment(images=images, draws=draws)["images"]
        tensors = self.to_tensor(images=images)["images"]  # (N, 3, 32, 32)
        return list(zip(tensors, self.labels[indices].tolist(), strict=True))

    def draws(self, epoch: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The random numbers that these images' augmentation follows in an epoch, a row each: see `BatchTransform`."""
        return _draws(self.seed, epoch, self._whole)[self._rows[indices]]

    def subset(self, indices: Sequence[int] | Tensor, augment: Sequence[str] = ()) -> "CIFAR10":
        """A copy that holds only these images, in this order, with its own choice of augmentations.

        An image keeps its draws: they depend on where it stands in the whole set.
        """
        part = object.__new__(CIFAR10)
        part.__dict__.update(self.__dict__)
        part.augmentations = tuple(augment)
        part.augment = train_transform(augment, self.padding) if augment else None
        part.images, part.labels, part._rows = self.images[indices], self.labels[indices], self._rows[indices]
        return part


@functools.lru_cache(maxsize=2)
def _draws(seed: int, epoch: int, size: int) -> np.ndarray:
    """What `BatchTransform` takes, a row for each of `size` images. Those of the flips alternate."""
    draws = np.random.default_rng((seed, AUGMENTATION, epoch)).random((size, len(DRAWN_FOR)))
    sides = np.random.default_rng((seed, FLIPS)).integers(2, size=size)
    draws[:, DRAWN_FOR.index("flip")] = (epoch + sides) % 2 / 2
    return draws


class EpochSampler(Sampler):
    """Without `skip`, every index once per epoch, in an order of (seed, epoch) alone, as pairs (epoch, index).

    Each pass over it is the next epoch; set `epoch` to go to another, and `start` to leave out the first images of
    the next pass, because they were met before an interruption. Of several processes (`ranks`) each gets every
    `ranks`-th image, so that together they have all, and in each step the images that one process alone would have.

    With `skip`, from 0 to 0.6, all but the first and the last of `epochs` leave out this share of the images, drawn
    from the two thirds on which the network had the smallest `losses` when it last met them: a short training learns
    more per second from the others, and the last epoch shows every image once more. (Learning from the hard images:
    Jiang et al., "Accelerating deep learning by focusing on the biggest losers", 2019, and K. Jordan's airbench96,
    2024; drawing among the easy ones: Qin et al., "InfoBatch", 2024, who give those that are kept more weight.)

    Attributes:
        losses: float32 (size,), in nats, of every image when it was last met. With `skip`, whoever trains gives them
            to `note` after each epoch.

    Raises:
        ValueError: `skip` is out of range, or comes without `epochs`.
    """

    def __init__(
        self, size: int, seed: int = 0, rank: int = 0, ranks: int = 1, *, skip: float = 0.0, epochs: int = 0
    ) -> None:
        if not 0 <= skip <= MAX_SKIP or (skip and epochs < 1):
            raise ValueError(
                f"skip must be from 0 to {MAX_SKIP} and come with the number of epochs, got {skip}, {epochs}"
            )
        self.size, self.seed, self.rank, self.ranks, self.skip, self.epochs = size, seed, rank, ranks, skip, epochs
        self.epoch = self.start = 0
        self.losses = torch.zeros(size)

    def __len__(self) -> int:
        return len(range(self.rank, self.count(self.epoch), self.ranks))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start, self.epoch, self.start = self.epoch, self.start, self.epoch + 1, 0
        return ((epoch, int(i)) for i in self.order(epoch)[start:][self.rank :: self.ranks])

    def count(self, epoch: int) -> int:
        """How many images the epoch, from 0, has for all processes together."""
        return self.size - (int(self.skip * self.size) if 0 < epoch < self.epochs - 1 else 0)

    def order(self, epoch: int) -> np.ndarray:
        """The indices that all processes together meet in the epoch, from 0; with `skip`, by the losses known now."""
        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.size)
        if left_out := self.size - self.count(epoch):
            easy = self.losses.argsort(stable=True)[: 2 * self.size // 3].numpy()
            draw = np.random.default_rng((self.seed, SKIP, epoch)).choice(easy, left_out, replace=False)
            order = order[~np.isin(order, draw)]
        return order

    def note(self, epoch: int, losses: Tensor) -> None:
        """Takes the losses of the epoch's images, in their order, float (count(epoch),)."""
        self.losses[torch.from_numpy(self.order(epoch))] = losses.float().cpu()


def make_loader(
    dataset: CIFAR10,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    ranks: int = 1,
    skip: float = 0.0,
    epochs: int = 0,
) -> DataLoader:
    """Batches (float32 (B, 3, 32, 32), int64 (B,)): shuffled anew each epoch if `train`, else in order.

    The last batch is smaller where `batch_size` does not divide the dataset; but for `skip`, which with `epochs` is as
    in `EpochSampler`, no image is left out. The batches are the same for any number of workers. These live as long as
    the loader, so that an epoch starts at once. Of several processes (`ranks`, which must divide `batch_size`) each
    gets its share of every batch.
    """
    size = len(dataset)
    return DataLoader(
        dataset,
        batch_size // ranks,
        sampler=(
            EpochSampler(size, dataset.seed, rank, ranks, skip=skip, epochs=epochs)
            if train
            else range(rank, size, ranks)
        ),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch would draw from the state that dropout draws from
    )


def end_workers(loader: DataLoader) -> None:
    """Ends the processes of a loader now. An exception would keep them, and ending them later can take a minute."""
    if iterator := getattr(loader, "_iterator", None):
        with contextlib.suppress(RuntimeError):  # of one that was killed
            iterator._shutdown_workers()


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes, but for the training one to answer
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # OpenCV's threads would fight those of training for the cores
