"""What happens to an image before the network sees it, as Albumentations transforms of whole batches.

The numbers that chance draws come from sampling.py.
"""

import functools
import os
import random
from collections.abc import Sequence
from typing import Any

# Albumentations asks the network for a newer version when it is imported; it must not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np

from machinery.data.sampler import (
    AUGMENTATIONS,
    DRAWN_FOR,
    HOLE,
    MAX_PADDING,
    PADDING,
    crop_corners,
    hole_corners,
    is_flipped,
)


class BatchTransform(A.ImageOnlyTransform):
    """An Albumentations transform of a batch in which each image follows random numbers of its own.

    Albumentations gives all `images` of a call the same draw, and called for one image after the other it spends most
    of the time on the calls. So these transforms are called with `images`, uint8 (N, H, W, C), and `draws`, float
    uniform in [0, 1), with a row for each image and the columns of `DRAWN_FOR`: what one augmentation draws does not
    depend on which others are chosen.
    """

    name: str  # in AUGMENTATIONS

    def __init__(self, p: float = 1) -> None:
        super().__init__(p=p)

    @property
    def targets_as_params(self) -> list[str]:
        return ["draws"]

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> Any:
        if "draws" not in data:
            raise ValueError(
                f"the named augmentations need images=uint8 (N, H, W, C) and draws=(N, {len(DRAWN_FOR)}), got "
                f"{', '.join(data) or 'nothing'}; for single images, give CIFAR10(augment=...) or "
                "CIFAR10(transform=...) what is to happen to them"
            )
        return super().__call__(*args, force_apply=force_apply, **data)

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

    name = "crop"

    def __init__(self, padding: int = PADDING, p: float = 1) -> None:
        super().__init__(p)
        self.padding = padding

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        (height, width), sides = images.shape[1:3], (self.padding, self.padding)
        padded = np.pad(images, ((0, 0), sides, sides, (0, 0)), mode="reflect")
        corners = crop_corners(draws, self.padding).tolist()
        return np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


class Flip(BatchTransform):
    """Mirrors left and right, for draws of at least a half; sampling.py makes these alternate from epoch to epoch."""

    name = "flip"

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        return np.where(is_flipped(draws)[:, :, None, None], images[:, :, ::-1], images)


class OneByOne(BatchTransform):
    """An Albumentations transform called for one image after the other, for where the work itself takes long."""

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
    """Covers one square of `HOLE` px inside the image with `colour`, RGB 0-255 (DeVries & Taylor, 2017)."""

    name = "cutout"

    def __init__(self, colour: Sequence[int] = (0, 0, 0), p: float = 1) -> None:
        super().__init__(p)
        self.colour = tuple(colour)

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        images = images.copy()
        for image, (y, x) in zip(images, hole_corners(draws, images.shape[1:3]).tolist(), strict=True):
            image[y : y + HOLE, x : x + HOLE] = self.colour
        return images


class JPEG(A.ImageCompression):
    """As `A.ImageCompression`, which gives OpenCV red for blue; JPEG treats them unlike."""

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        spoilt = super().apply(np.ascontiguousarray(img[..., ::-1]), *args, **params)
        return np.ascontiguousarray(spoilt[..., ::-1])


class Corrupt(OneByOne):
    """A third of the time, noise, blur or JPEG compression at a strength of its own, as photographs have them.

    For weights that are to be used on pictures of other origin (Hendrycks & Dietterich, 2019, measure what these cost).
    """

    name = "corrupt"

    def __init__(self, p: float = 1) -> None:
        super().__init__(p)
        self.transform = A.OneOf(
            [
                A.GaussNoise(std_range=(0, 0.1), p=1),
                A.GaussianBlur(sigma_limit=(0.2, 1.4), blur_limit=0, p=1),
                JPEG(quality_range=(30, 95), p=1),
            ],
            p=1 / 3,
        )


def random_part(augment: Sequence[str], padding: int, colour: tuple[int, ...]) -> A.Compose:
    """These augmentations, in the order of `AUGMENTATIONS`, called with `images` and `draws`: see `BatchTransform`.

    Args:
        augment: At least one name among `AUGMENTATIONS`.
        padding: By how many pixels "crop" moves an image at most, 0 to 31.
        colour: With which "cutout" covers, RGB 0-255.

    Raises:
        ValueError: A name is not among these, there is none, or `padding` is out of range.
    """
    if isinstance(augment, str) or not augment or not set(augment) <= set(AUGMENTATIONS):
        raise ValueError(f"augment takes a sequence of names among {', '.join(AUGMENTATIONS)}, got {augment!r}")
    if not 0 <= padding <= MAX_PADDING:
        raise ValueError(
            f"padding must be from 0 to {MAX_PADDING}, for a side of 32 has no more to reflect, got {padding!r}"
        )
    return _random_part(tuple(augment), padding, colour)


@functools.lru_cache
def _random_part(augment: tuple[str, ...], padding: int, colour: tuple[int, ...]) -> A.Compose:
    transforms = (Crop(padding), Flip(), Affine(), Trivial(), Cutout(colour), Corrupt())
    return A.Compose([transform for transform in transforms if transform.name in augment], strict=True)


@functools.lru_cache
def fixed_part(mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), normalised; called with `images=`, or with `image=` on one."""
    return A.Compose([A.Normalize(mean, std), A.ToTensorV2()], strict=True)
