"""Batches drawn on the device where training is, and the processes that prepare batches elsewhere."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from machinery.data.sampler import DRAWN_FOR, HOLE, EpochSampler, crop_corners, hole_corners, is_flipped

ON_DEVICE = {"crop", "flip", "cutout"}  # the augmentations that `DeviceLoader` can do


class DeviceLoader:
    """The batches of `make_loader`, made on the device: float32 (B, 3, H, W) in channels_last, and labels int64 (B,).

    The uint8 images are moved there once; crop, flip and cutout follow the draws that the Dataset's own transforms
    follow, so the images before normalisation are the same, bit for bit.

    Args:
        dataset: `images.Images`, whose augmentations must be among "crop", "flip" and "cutout".
        batch_size: Of all processes together; each makes its own part.
        sampler: As in `make_loader`.
        device: Where to.
    """

    def __init__(self, dataset: Any, batch_size: int, sampler: EpochSampler | range, device: torch.device) -> None:
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        self.ranks = sampler.ranks if isinstance(sampler, EpochSampler) else sampler.step
        images = dataset.images.numpy()
        if "crop" in dataset.augment:
            sides = (dataset.padding, dataset.padding)
            images = np.pad(images, ((0, 0), sides, sides, (0, 0)), mode="reflect")
        self.images = torch.from_numpy(images).to(device)  # uint8 (N, H, W, 3)
        self.labels = dataset.labels.to(device)
        self.size = (dataset.images.shape[1], dataset.images.shape[2])
        self.mean, self.std = (255 * torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))
        self.colour = torch.tensor(dataset.hole_colour, dtype=torch.uint8, device=device)

    @staticmethod
    def can_draw(dataset: Any) -> bool:
        """Whether the images of this Dataset can be drawn here."""
        in_memory = all(hasattr(dataset, name) for name in ("images", "labels", "draws", "transform", "augment"))
        return in_memory and dataset.transform is None and ON_DEVICE.issuperset(dataset.augment)

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.batch_size // self.ranks))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = [key if isinstance(key, tuple) else (0, key) for key in self.sampler]
        indices = np.array([index for _, index in keys])
        order = self._moved(indices)
        rows = {name: self._moved(values) for name, values in self._places(keys[0][0], indices).items()} if keys else {}
        share = self.batch_size // self.ranks
        for part in (slice(start, start + share) for start in range(0, len(keys), share)):
            images = self.augmented(order[part], {name: values[part] for name, values in rows.items()})
            yield self.normalized(images), self.labels[order[part]]

    def _moved(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.images.device)

    def _places(self, epoch: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What the draws come to: for crop and cutout, corners int64 (N, 2) as (y, x); for flip, bool (N,)."""
        if not self.dataset.augment:
            return {}
        draws = self.dataset.draws(epoch, indices)
        draw = {name: draws[:, [other == name for other in DRAWN_FOR]] for name in self.dataset.augment}
        places = {
            "crop": lambda: crop_corners(draw["crop"], self.dataset.padding),
            "flip": lambda: is_flipped(draw["flip"])[:, 0],
            "cutout": lambda: hole_corners(draw["cutout"], self.size),
        }
        return {name: places[name]() for name in draw}

    def augmented(self, batch: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """The images at the indices `batch` (B,), after augmentation, uint8 (B, H, W, 3)."""
        y, x = (torch.arange(side, device=batch.device).expand(len(batch), side) for side in self.size)
        down, across = y, x
        if "flip" in rows:
            across = torch.where(rows["flip"][:, None], self.size[1] - 1 - x, x)
        if "crop" in rows:
            down, across = down + rows["crop"][:, :1], across + rows["crop"][:, 1:]
        images = self.images[batch[:, None, None], down[:, :, None], across[:, None, :]]
        if "cutout" in rows:
            inside = [
                (line >= rows["cutout"][:, i : i + 1]) & (line < rows["cutout"][:, i : i + 1] + HOLE)
                for i, line in enumerate((y, x))
            ]
            hole = inside[0][:, :, None, None] & inside[1][:, None, :, None]
            images = torch.where(hole, self.colour, images)
        return images

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), laid out in channels_last."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def end_workers(loader: object) -> None:
    """Ends the processes of a loader now. An exception would keep them, and ending them later can take a minute."""
    if iterator := getattr(loader, "_iterator", None):
        with contextlib.suppress(RuntimeError):  # of one that was killed
            iterator._shutdown_workers()


def start_worker(worker: int) -> None:
    """What each process of a loader does first."""
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes, but for the training one to answer
        signal.signal(number, signal.SIG_IGN)
    import cv2  # noqa: PLC0415  whoever has no workers does not wait for it

    cv2.setNumThreads(0)  # its threads would fight those of training for the cores
