"""What chance decides in training: the order of the images, and the numbers that their augmentation follows.

All of it depends on (seed, epoch, image) alone, never on the process, the worker, the batch or the calls before.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

# Stand behind the seed, so that no two uses draw the same numbers.
FLIPS, ORDER, AUGMENTATION, SKIP, TRANSFORM = range(1, 6)
MAX_SKIP = 0.6  # of the images; `EpochSampler` draws them from two thirds

PADDING = 4  # pixels on each side before the crop, by default
MAX_PADDING = 31  # a side of 32 has no more to reflect
HOLE = 8  # pixels, the side of the square that cutout covers

# That an image needs for each augmentation.
NUMBERS = {"crop": 2, "flip": 1, "affine": 1, "trivial": 1, "cutout": 2, "corrupt": 1}
AUGMENTATIONS = tuple(NUMBERS)  # in the order in which they are applied
DRAWN_FOR = tuple(name for name, count in NUMBERS.items() for _ in range(count))
DEFAULT_AUGMENT = ("crop", "flip", "cutout")


@functools.lru_cache(maxsize=2)
def draws_of(seed: int, epoch: int, size: int) -> np.ndarray:
    """The random numbers that the augmentation of each of `size` images follows in an epoch, uniform in [0, 1).

    float64 (size, columns of `DRAWN_FOR`). Those of the flips alternate.
    """
    generator = np.random.default_rng((seed, AUGMENTATION, epoch))
    # "corrupt" draws after all the others, so these draw what they drew before there was such an augmentation.
    draws = np.hstack([generator.random((size, columns)) for columns in (len(DRAWN_FOR) - 1, 1)])
    sides = np.random.default_rng((seed, FLIPS)).integers(2, size=size)
    draws[:, DRAWN_FOR.index("flip")] = (epoch + sides) % 2 / 2
    return draws


@functools.lru_cache(maxsize=2)
def seeds_of(seed: int, epoch: int, size: int) -> np.ndarray:
    """What a transform of the user's own starts from for each of `size` images, int64 (size,), below 2**62."""
    return np.random.default_rng((seed, TRANSFORM, epoch)).integers(2**62, size=size)


def crop_corners(draws: np.ndarray, padding: int) -> np.ndarray:
    """Where in the padded image the crop begins, int64 (N, 2) as (y, x), for draws (N, 2)."""
    return (draws * (2 * padding + 1)).astype(np.int64)


def hole_corners(draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the square that cutout covers begins, int64 (N, 2) as (y, x), for draws (N, 2) and images of this size."""
    return (draws * (np.array(size) - HOLE + 1)).astype(np.int64)


def is_flipped(draws: np.ndarray) -> np.ndarray:
    """Whether an image is mirrored, bool, for draws of the same shape."""
    return draws >= 0.5


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
