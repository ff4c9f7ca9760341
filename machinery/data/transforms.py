"""Albumentations transforms of the named augmentations, and users' transforms."""

import copy
import functools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Albumentations asks the network for a newer version when it is imported; it must not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from machinery.data.augment import (
    AUGMENTATIONS,
    COLUMNS,
    IN_BATCHES,
    NUMBERS,
    PADDING,
    augmented,
    check_augment,
    random_states,
)
from machinery.errors import SettingError


class JPEG(A.ImageCompression):
    """`A.ImageCompression` in OpenCV's channel order, since JPEG treats red and blue differently."""

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        spoilt = super().apply(np.ascontiguousarray(img[..., ::-1]), *args, **params)
        return np.ascontiguousarray(spoilt[..., ::-1])


def _affine(p: float = 1, **options: Any) -> A.Affine:
    """`A.Affine`, reflected at the borders."""
    return A.Affine(border_mode=cv2.BORDER_REFLECT_101, p=p, strict=True, **options)  # type: ignore[call-arg]


SAME, NONE, TURN, SHEAR, SHIFT, FACTOR = (1, 1), (0, 0), (-30, 30), (-17, 17), (-0.3, 0.3), (0.1, 1.9)
ONE_BY_ONE: dict[str, A.BasicTransform | A.OneOf] = {  # of images, whose work takes so long that calls cost little
    "affine": _affine(0.5, translate_percent=(-0.05, 0.05), scale=(0.9, 1.1), rotate=(-10, 10), keep_ratio=True),
    # For long trainings, after TrivialAugment (Müller & Hutter, 2021), which changes nearly every image, also blurs,
    # and goes further in most.
    "trivial": A.OneOf(
        [
            _affine(rotate=TURN),
            _affine(shear={"x": SHEAR, "y": NONE}),
            _affine(shear={"x": NONE, "y": SHEAR}),
            _affine(translate_percent={"x": SHIFT, "y": NONE}),
            _affine(translate_percent={"x": NONE, "y": SHIFT}),
            A.ColorJitter(FACTOR, SAME, SAME, NONE, p=1),  # brightness
            A.ColorJitter(SAME, FACTOR, SAME, NONE, p=1),  # contrast
            A.ColorJitter(SAME, SAME, FACTOR, NONE, p=1),  # saturation
            A.Sharpen(alpha=(0, 0.9), lightness=SAME, p=1),
            A.Posterize(num_bits=(4, 8), p=1),
            A.Solarize(threshold_range=(0, 1), p=1),
            A.AutoContrast(method="pil", p=1),  # the other method is nearly Equalize
            A.Equalize(p=1),
        ],
        p=0.5,
    ),
    # For weights that are to be used on pictures of other origin (Hendrycks & Dietterich, 2019, measure what noise,
    # blur and compression cost).
    "corrupt": A.OneOf(
        [
            A.GaussNoise(std_range=(0, 0.1), p=1),
            A.GaussianBlur(sigma_limit=(0.2, 1.4), blur_limit=0, p=1),
            JPEG(quality_range=(30, 95), p=1),
        ],
        p=1 / 3,
    ),
}


class Named(A.ImageOnlyTransform):
    """One of `AUGMENTATIONS` for a batch in which each image has its own draws, as Albumentations cannot.

    Called with `images`, uint8 (N, H, W, 3), and `draws`, float64 (N, `NUMBERS`), uniform in [0, 1).
    """

    def __init__(self, name: str, padding: int = PADDING, fill: Sequence[int] = (0, 0, 0), p: float = 1) -> None:
        super().__init__(p=p)
        self.name, self.padding, self.fill = name, padding, tuple(fill)

    @property
    def targets_as_params(self) -> list[str]:
        return ["draws"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        if np.shape(data["draws"]) != (len(data.get("images", ())), NUMBERS):
            raise ValueError(
                f"the named augmentations need images=uint8 (N, H, W, 3) and draws=float64 (N, {NUMBERS}); for single "
                "images, give CIFAR10(augment=...) or CIFAR10(transform=...) what is to happen to them"
            )
        return {"draws": data["draws"]}

    def apply_to_images(self, images: np.ndarray, draws: np.ndarray, **params: Any) -> np.ndarray:
        if self.name in IN_BATCHES:
            fill = torch.tensor(self.fill, dtype=torch.uint8)
            return augmented(torch.tensor(images), torch.tensor(draws), (self.name,), self.padding, fill).numpy()
        seeds = (draws[:, COLUMNS[self.name]] * 2**53).astype(int).flatten().tolist()
        transform = ONE_BY_ONE[self.name]
        return np.stack([_drawn(transform, image, seed) for image, seed in zip(images, seeds, strict=True)])


def _drawn(transform: Any, image: np.ndarray, seed: int) -> Any:
    """The result of an Albumentations transform on an image, with draws that follow the seed."""
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))  # and those of all nested in it
    return transform(image=image)["image"]


@functools.lru_cache
def random_part(augment: tuple[str, ...], padding: int, fill: tuple[int, ...]) -> A.Compose:
    """`dataset.train_transform` with the fill of "cutout", RGB 0-255."""
    check_augment(augment, padding)
    if not augment:
        raise ValueError("augment names no augmentation; at least one is needed")
    return A.Compose([Named(name, padding, fill) for name in AUGMENTATIONS if name in augment], strict=True)


@functools.lru_cache
def fixed_part(mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """`dataset.eval_transform`."""
    return A.Compose([A.Normalize(mean, std), A.ToTensorV2()], strict=True)


class Pipeline:
    """A copy of a user's transform, called on single images with draws that follow a seed.

    Albumentations gets image=uint8 (H, W, 3), torchvision a PIL image, any other callable uint8 (H, W, 3).
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        if not callable(transform):
            raise SettingError(f"transform must be callable, such as A.Compose([...]), got {transform!r}")
        try:
            self.transform = copy.deepcopy(transform)
        except Exception as error:
            raise SettingError(f"transform: each set takes a copy, and it cannot be copied: {error}") from error
        self.of_albumentations = isinstance(transform, A.BasicTransform | A.BaseCompose)
        parts = transform.modules() if isinstance(transform, nn.Sequential) else [transform]
        bases = [base for part in parts for base in type(part).__mro__]  # by `isinstance`, torchvision were imported
        self.of_torchvision = any(base.__module__.startswith("torchvision.transforms") for base in bases)

    def __call__(self, images: Iterable[np.ndarray], seeds: Iterable[int]) -> list[Tensor]:
        """Each uint8 (H, W, 3) -> uint8 or float32 (3, H', W'), with a seed below 2**62; else SettingError."""
        with random_states() as set_to:
            changed = []
            for image, seed in zip(images, seeds, strict=True):
                set_to(seed)
                changed.append(_tensor_of(self._called(image, seed)))
        return changed

    def _called(self, image: np.ndarray, seed: int) -> Any:
        if self.of_albumentations:
            return _drawn(self.transform, image, seed)
        return self.transform(Image.fromarray(image) if self.of_torchvision else image)


def _tensor_of(image: Any) -> Tensor:
    """The transform's result as uint8 or float32 (3, H, W)."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
    is_image = isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3
    if not is_image or not (image.dtype == torch.uint8 or image.is_floating_point()):
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else repr(type(image))
        raise SettingError(
            "transform must return an image of three channels (a tensor is (3, H, W)), uint8, which is then "
            f"normalised, or finished float, got {found}"
        )
    image = image.as_subclass(Tensor)
    return image if image.dtype == torch.uint8 else image.float()
