"""The random part of training: the order of the images, and crop, flip and cutout of whole batches.

The random numbers depend on (seed, epoch, image) alone, not on process, worker or batch, so a CPU, a GPU and
Albumentations give the same. The functions take images uint8 (N, H, W, 3) and, on the same device, draws float64
(N, 1 or 2), uniform in [0, 1).
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler

# Stand behind the seed, so that no two uses draw the same numbers.
FLIPS, ORDER, AUGMENTATION, SKIP, TRANSFORM = range(1, 6)

PADDING = 4  # pixels on each side before the crop, by default
MAX_PADDING = 31  # a side of 32 has no more to reflect
MAX_SKIP = 0.6  # of the images of an epoch; they are drawn from two thirds

NUMBERS = 8  # that each image draws in an epoch
COLUMNS = {  # of each augmentation among them, in the order in which these are applied
    **{"crop": slice(0, 2), "flip": slice(2, 3), "affine": slice(3, 4)},
    **{"trivial": slice(4, 5), "cutout": slice(5, 7), "corrupt": slice(7, 8)},
}
AUGMENTATIONS = tuple(COLUMNS)
DEFAULT_AUGMENT = ("crop", "flip", "cutout")
IN_BATCHES = {"crop", "flip", "cutout"}  # those that `augmented` does
HOLE = 8  # pixels, the side of the square that cutout covers
# Of test-time augmentation: how far the image moves, in pixels (down, right), and the weight of that place; each with
# its mirror image. As in airbench (K. Jordan, 2024).
VIEWS = (((0, 0), 0.5), ((1, 1), 0.25), ((-1, -1), 0.25))


class EpochSampler(Sampler):
    """Pairs (epoch, index), every index once per epoch, in an order of (seed, epoch) alone.

    Each pass is the next epoch; set `epoch` to go to another, and `start` to leave out its first images, already seen.
    Each of several processes gets every `ranks`-th image; the last few, which do not divide by `ranks`, are left out.

    With `skip`, 0 to 0.6, all but the first and the last of `epochs` leave out this share of the images, drawn from the
    two thirds with the smallest `losses`, float32 (size,): a short training learns more per second from the others
    (Jiang et al., "Accelerating deep learning by focusing on the biggest losers", 2019; K. Jordan's airbench96, 2024;
    Qin et al., "InfoBatch", 2024). The training loop passes the losses to `note`.
    """

    def __init__(
        self, size: int, seed: int = 0, rank: int = 0, ranks: int = 1, *, skip: float = 0.0, epochs: int = 0
    ) -> None:
        if not 0 <= skip <= MAX_SKIP or (skip and epochs < 1):
            raise ValueError(f"skip must be from 0 to {MAX_SKIP} and come with epochs, got {skip}, {epochs}")
        self.size, self.seed, self.rank, self.ranks, self.skip, self.epochs = size, seed, rank, ranks, skip, epochs
        self.epoch = self.start = 0
        self.losses = torch.zeros(size)

    def __len__(self) -> int:
        return self.count(self.epoch) // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, indices = self.next_epoch()
        return ((epoch, int(i)) for i in indices)

    def next_epoch(self) -> tuple[int, np.ndarray]:
        """The epoch of the next pass, and the indices of this process in it; counts as a pass."""
        epoch, start, self.epoch, self.start = self.epoch, self.start, self.epoch + 1, 0
        return epoch, self.order(epoch)[start:][self.rank :: self.ranks]

    def count(self, epoch: int) -> int:
        """How many images the epoch, from 0, has over all processes."""
        kept = self.size - self._pruned(epoch)
        return kept - kept % self.ranks

    def _pruned(self, epoch: int) -> int:
        """How many images `skip` leaves out of the epoch."""
        return int(self.skip * self.size) if 0 < epoch < self.epochs - 1 else 0

    def order(self, epoch: int) -> np.ndarray:
        """The indices of all processes in the epoch, from 0; with `skip`, by the current losses."""
        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.size)
        if pruned := self._pruned(epoch):
            easy = self.losses.argsort(stable=True)[: 2 * self.size // 3].numpy()
            draw = np.random.default_rng((self.seed, SKIP, epoch)).choice(easy, pruned, replace=False)
            order = order[~np.isin(order, draw)]
        return order[: self.count(epoch)]

    def note(self, epoch: int, losses: Tensor) -> None:
        """Takes the losses of the epoch's images, in their order, float (count(epoch),)."""
        self.losses[torch.from_numpy(self.order(epoch))] = losses.float().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The losses, on which `skip` depends; `epoch` and `start` are set by hand."""
        return {"losses": self.losses} if self.skip else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses.copy_(state["losses"])


@functools.lru_cache(maxsize=2)
def draws_of(seed: int, epoch: int, size: int) -> np.ndarray:
    """The draws of each of `size` images in an epoch: float64 (size, `NUMBERS`), uniform in [0, 1); flips alternate."""
    generator = np.random.default_rng((seed, AUGMENTATION, epoch))
    # "corrupt" draws after all the others, so these draw what they drew before there was such an augmentation.
    draws = np.hstack([generator.random((size, columns)) for columns in (NUMBERS - 1, 1)])
    sides = np.random.default_rng((seed, FLIPS)).integers(2, size=size)
    draws[:, COLUMNS["flip"]] = ((epoch + sides) % 2 / 2)[:, None]
    return draws


@functools.lru_cache(maxsize=2)
def seeds_of(seed: int, epoch: int, size: int) -> np.ndarray:
    """The seeds of users' transforms for `size` images, int64 (size,), below 2**62."""
    return np.random.default_rng((seed, TRANSFORM, epoch)).integers(2**62, size=size)


def check_augment(names: Sequence[str], padding: int) -> None:
    """Raises ValueError unless `names` are among `AUGMENTATIONS` and `padding` is in range."""
    if isinstance(names, str) or not isinstance(names, Sequence) or any(n not in AUGMENTATIONS for n in names):
        raise ValueError(f"augment takes a sequence of names among {', '.join(AUGMENTATIONS)}, got {names!r}")
    if not 0 <= padding <= MAX_PADDING:
        raise ValueError(f"padding must be from 0 to {MAX_PADDING}, got {padding!r}")


@contextlib.contextmanager
def random_states() -> Iterator[Callable[[int], None]]:
    """Restores all random states afterwards; with a seed below 2**62, sets those of the CPU inside."""

    def set_to(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(gpus):
        try:
            yield set_to
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def augmented(images: Tensor, draws: Tensor, names: Sequence[str], padding: int, fill: Tensor) -> Tensor:
    """Applies those of `IN_BATCHES` in `names`, in the order of `AUGMENTATIONS`; draws (N, `NUMBERS`)."""
    if "crop" in names:
        images = crop(images, draws[:, COLUMNS["crop"]], padding)
    if "flip" in names:
        images = torch.where((draws[:, COLUMNS["flip"]] >= 0.5)[:, :, None, None], images.flip(2), images)
    if "cutout" in names:
        images = cutout(images, draws[:, COLUMNS["cutout"]], fill)
    return images


def crop(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Moves each image by up to `padding` pixels each way, reflected at the borders; draws (N, 2)."""
    count, height, width, channels = images.shape
    corners = (draws * (2 * padding + 1)).long() - padding  # (N, 2) as (y, x)
    y, x = _reflected(corners[:, :1], height), _reflected(corners[:, 1:], width)  # (N, H) and (N, W)
    rows = torch.arange(count, device=images.device)[:, None] * height + y
    pixels = rows[:, :, None] * width + x[:, None, :]
    return images.reshape(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def _reflected(corner: Tensor, side: int) -> Tensor:
    """For windows that begin at `corner` (N, 1), the source line of each of `side` lines, (N, side)."""
    period = max(2 * side - 2, 1)
    places = (corner + torch.arange(side, device=corner.device)) % period
    return torch.minimum(places, period - places)


def cutout(images: Tensor, draws: Tensor, fill: Tensor) -> Tensor:
    """Fills a square of `HOLE` px inside each image with `fill`, uint8 (3,); draws (N, 2) (DeVries & Taylor, 2017)."""
    inside = []
    for axis, side in enumerate(images.shape[1:3]):
        start = (draws[:, axis, None] * (side - HOLE + 1)).long()  # (N, 1)
        place = torch.arange(side, device=images.device)
        inside.append((place >= start) & (place < start + HOLE))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return torch.where(hole[..., None], fill, images)


def fill_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The fill of "cutout", RGB 0-255, from the mean on the scale 0-1."""
    return tuple(np.rint(255 * np.array(mean)).astype(int).tolist())


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W), as `A.Normalize` bit for bit; mean, std (3,) on the scale 0-1."""
    return images.float().sub_(255 * mean).mul_((255 * std).reciprocal()).movedim(-1, -3)


def views_of(images: Tensor, views: int) -> Iterator[tuple[Tensor, float]]:
    """The images alone for 1, or six views for 6, (N, C, H, W) each, with weights that sum to 1."""
    if views not in (1, 6):
        raise ValueError(f"views must be 1 or 6 (the image, moved by a pixel two ways, each mirrored), got {views}")
    if views == 1:
        yield images, 1.0
        return
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    for (down, right), weight in VIEWS:
        moved = padded[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        yield moved, weight / 2
        yield moved.flip(3), weight / 2


def cutmix(share: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixes images and labels in this share of the batches (Yun et al., "CutMix", 2019); None for 0."""
    if not share:
        return None
    from torchvision.transforms import v2  # noqa: PLC0415  takes a second, and only this needs it

    return v2.RandomApply([v2.CutMix(num_classes=classes)], share)
