"""What happens to an image before the network sees it, as Albumentations transforms of whole batches."""

import os
import random
from collections.abc import Sequence
from typing import Any

# Albumentations asks the network for a newer version when it is imported; it must not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

# Of the 50,000 training images, per channel (RGB), on the scale 0-1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

PADDING = 4  # pixels on each side before the crop, by default
MAX_PADDING = 31  # a side of 32 has no more to reflect
HOLE = 8  # pixels, the side of the square that cutout covers
HOLE_COLOUR = np.rint(255 * np.array(MEAN)).astype(np.uint8)


def crop_corners(draws: np.ndarray, padding: int) -> np.ndarray:
    """Where in the padded image the crop begins, int64 (N, 2) as (y, x), for draws (N, 2)."""
    return (draws * (2 * padding + 1)).astype(np.int64)


def hole_corners(draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the square that cutout covers begins, int64 (N, 2) as (y, x), for draws (N, 2) and images of this size."""
    return (draws * (np.array(size) - HOLE + 1)).astype(np.int64)


def is_flipped(draws: np.ndarray) -> np.ndarray:
    """Whether an image is mirrored, bool, for draws of the same shape."""
    return draws >= 0.5


class BatchTransform(A.ImageOnlyTransform):
    """An Albumentations transform of a batch in which each image follows random numbers of its own.

    Albumentations gives all `images` of a call the same draw, and called for one image after the other it spends most
    of the time on the calls. So these transforms are called with `images`, uint8 (N, H, W, C), and `draws`, float
    uniform in [0, 1), with a row for each image and the columns of `DRAWN_FOR`: what one augmentation draws does not
    depend on which others are chosen.
    """

    name: str  # in AUGMENTATIONS
    numbers: int  # that an image needs for it

    def __init__(self, p: float = 1) -> None:
        super().__init__(p=p)

    @property
    def targets_as_params(self) -> list[str]:
        return ["draws"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        images, draws = data.get("images"), data["draws"]
        if images is None or np.shape(draws) != (len(images), len(DRAWN_FOR)):
            raise ValueError(
                f"expected images=uint8 (N, H, W, C) and draws=(N, {len(DRAWN_FOR)}), got "
                f"{', '.join(f'{name} {np.shape(value)}' for name, value in data.items())}"
            )
        return {"draws": draws[:, [name == self.name for name in DRAWN_FOR]]}


class Crop(BatchTransform):
    """Pads by `padding` px, reflected, and crops to the size from before: moves the image by up to so much each way."""

    name, numbers = "crop", 2

    def __init__(self, padding: int = PADDING, p: float = 1) -> None:
        super().__init__(p)
        self.padding = padding

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        (height, width), sides = images.shape[1:3], (self.padding, self.padding)
        padded = np.pad(images, ((0, 0), sides, sides, (0, 0)), mode="reflect")
        corners = crop_corners(draws, self.padding).tolist()
        return np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


class Flip(BatchTransform):
    """Mirrors left and right, for draws of at least a half; dataset.py makes these alternate from epoch to epoch."""

    name, numbers = "flip", 1

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        return np.where(is_flipped(draws)[:, :, None, None], images[:, :, ::-1], images)


class OneByOne(BatchTransform):
    """An Albumentations transform called for one image after the other, for where the work itself takes long."""

    numbers = 1
    transform: A.BasicTransform | A.OneOf

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        changed = []
        for image, seed in zip(images, (draws[:, 0] * 2**53).astype(int).tolist(), strict=True):
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            changed.append(self.transform(image=image)["image"])
        return np.stack(changed)


class Affine(OneByOne):
    """Shifts by up to 5 %, scales by 0.9 to 1.1 and rotates by up to 10 degrees, half of the time."""

    name = "affine"

    def __init__(self, p: float = 1) -> None:
        super().__init__(p)
        self.transform = reflecting_affine(
            translate_percent=(-0.05, 0.05), scale=(0.9, 1.1), rotate=(-10, 10), keep_ratio=True, p=0.5
        )


class Trivial(OneByOne):
    """Half of the time, one of thirteen changes of colour or shape, at a strength of its own each time.

    For long trainings, after TrivialAugment (Müller & Hutter, 2021), which changes nearly every image, also blurs, and
    goes further in most.
    """

    name = "trivial"

    def __init__(self, p: float = 1) -> None:
        super().__init__(p)
        same, none, turn, shear, shift, factor = (1, 1), (0, 0), (-30, 30), (-17, 17), (-0.3, 0.3), (0.1, 1.9)
        self.transform = A.OneOf(
            [
                reflecting_affine(rotate=turn),
                reflecting_affine(shear={"x": shear, "y": none}),
                reflecting_affine(shear={"x": none, "y": shear}),
                reflecting_affine(translate_percent={"x": shift, "y": none}),
                reflecting_affine(translate_percent={"x": none, "y": shift}),
                A.ColorJitter(factor, same, same, none, p=1),  # brightness
                A.ColorJitter(same, factor, same, none, p=1),  # contrast
                A.ColorJitter(same, same, factor, none, p=1),  # saturation
                A.Sharpen(alpha=(0, 0.9), lightness=same, p=1),
                A.Posterize(num_bits=(4, 8), p=1),
                A.Solarize(threshold_range=(0, 1), p=1),
                A.AutoContrast(method="pil", p=1),  # the other method is nearly Equalize
                A.Equalize(p=1),
            ],
            p=0.5,
        )


def reflecting_affine(p: float = 1, **options: Any) -> A.Affine:
    """`A.Affine`, with what comes in at the borders reflected."""
    return A.Affine(border_mode=cv2.BORDER_REFLECT_101, p=p, strict=True, **options)  # type: ignore[call-arg]


class Cutout(BatchTransform):
    """Covers one square of `HOLE` px inside the image with the mean colour (DeVries & Taylor, 2017)."""

    name, numbers = "cutout", 2

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        images = images.copy()
        for image, (y, x) in zip(images, hole_corners(draws, images.shape[1:3]).tolist(), strict=True):
            image[y : y + HOLE, x : x + HOLE] = HOLE_COLOUR
        return images


TRANSFORMS = (Crop, Flip, Affine, Trivial, Cutout)  # in the order in which they are applied
AUGMENTATIONS = tuple(transform.name for transform in TRANSFORMS)
DRAWN_FOR = tuple(transform.name for transform in TRANSFORMS for _ in range(transform.numbers))
DEFAULT_AUGMENT = ("crop", "flip", "cutout")


def train_transform(augment: Sequence[str] = DEFAULT_AUGMENT, padding: int = PADDING) -> A.Compose:
    """The random part of the training transform, called with `images` and `draws`: see `BatchTransform`.

    Args:
        augment: At least one of "crop", "flip", "affine", "trivial" and "cutout"; they are applied in this order.
        padding: By how many pixels "crop" moves an image at most, 0 to 31.

    Raises:
        ValueError: A name is not among these, there is none, or `padding` is out of range.
    """
    if isinstance(augment, str) or not augment or not set(augment) <= set(AUGMENTATIONS):
        raise ValueError(f"augment takes a sequence of names among {', '.join(AUGMENTATIONS)}, got {augment!r}")
    if not 0 <= padding <= MAX_PADDING:
        raise ValueError(
            f"padding must be from 0 to {MAX_PADDING}, for a side of 32 has no more to reflect, got {padding!r}"
        )
    chosen = [transform for transform in TRANSFORMS if transform.name in augment]
    return A.Compose([Crop(padding) if transform is Crop else transform() for transform in chosen], strict=True)


def eval_transform() -> A.Compose:
    """The fixed part, after the random one or alone: uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32), normalised.

    Called with `images=` on a whole batch, or with `image=` on one.
    """
    return A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()], strict=True)


def denormalize(images: Tensor) -> np.ndarray:
    """Normalised float (N, 3, H, W) -> uint8 (N, H, W, 3) RGB 0-255, for people to look at."""
    images = images.detach().cpu().float() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
