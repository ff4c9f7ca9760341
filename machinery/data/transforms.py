"""Transforms that a user brings, and Datasets: given draws of (seed, epoch, image) alone, and what they lack."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from machinery.data.sampler import TRANSFORM

SCALING = (A.ToFloat, v1.ToTensor, v1.ConvertImageDtype, v2.ToTensor)  # after them, images are 0-1


class Pipeline:
    """A transform as users bring it, completed to a normalised float tensor, and with draws that can be repeated.

    Args:
        transform: Of Albumentations, called with image=uint8 (H, W, 3); of torchvision (v1 or v2), called with a PIL
            image, as in `torchvision.datasets`; or any callable, called with uint8 (H, W, 3). What it returns may be
            of any of these kinds, or a tensor. What it returns as uint8, or as float without a `Normalize` in it, is
            normalised; a float from any other callable is taken to be finished.
        mean: Of each channel, on the scale 0-1.
        std: Likewise.
    """

    def __init__(self, transform: Callable[..., Any], mean: Sequence[float], std: Sequence[float]) -> None:
        if not callable(transform):
            raise ValueError(f"transform must be callable, such as A.Compose([...]), got {transform!r}")
        self.transform, self.mean, self.std = transform, mean, std
        self.parts = list(_parts_of(transform))
        self.of_albumentations = isinstance(transform, A.BasicTransform | A.BaseCompose)
        self.of_torchvision = type(transform).__module__.startswith("torchvision.")
        known = self.of_albumentations or self.of_torchvision
        self.is_finished = not known or any(
            isinstance(p, A.Normalize | v1.Normalize | v2.Normalize) for p in self.parts
        )
        scales = any(isinstance(p, SCALING) or (isinstance(p, v2.ToDtype) and p.scale) for p in self.parts)
        self.largest = 1.0 if scales else 255.0
        own_code = any(isinstance(p, A.Lambda | v1.Lambda | v2.Lambda) for p in self.parts)
        self.draws_globally = not self.of_albumentations or own_code
        self.states = RandomStates([transform] if self.of_albumentations else [])

    def __call__(self, images: Iterable[np.ndarray], seeds: Iterable[int | None]) -> list[Tensor]:
        """Each uint8 (H, W, 3) -> float32 (3, H', W'), drawn as its seed says; without one, from the global states.

        Raises:
            ValueError: The transform returned something that is no image of three channels.
        """
        return [self._one(image, seed) for image, seed in zip(images, seeds, strict=True)]

    def _one(self, image: np.ndarray, seed: int | None) -> Tensor:
        if seed is None:
            self.states.seed(int(torch.randint(2**62, ())))
            return self._completed(self._called(image))
        self.states.seed(seed)
        if not self.draws_globally:
            return self._completed(self._called(image))
        with global_states(seed):
            return self._completed(self._called(image))

    def _called(self, image: np.ndarray) -> Any:
        if self.of_albumentations:
            return self.transform(image=image)["image"]
        return self.transform(Image.fromarray(image) if self.of_torchvision else image)

    def _completed(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
        if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
            found = f"{type(image).__name__} {tuple(image.shape)}" if isinstance(image, Tensor) else repr(type(image))
            raise ValueError(f"transform must return an image of three channels (a tensor is (3, H, W)), got {found}")
        if image.is_floating_point() and self.is_finished:
            return image.float()
        largest = self.largest if image.is_floating_point() else 255.0
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image.float() / largest - mean) / std


def _parts_of(transform: object) -> Iterator[object]:
    """The transform itself, and all that are inside of it."""
    yield transform
    inside = transform if isinstance(transform, torch.nn.Sequential) else getattr(transform, "transforms", ())
    for part in inside if isinstance(inside, Iterable) else ():
        yield from _parts_of(part)


class RandomStates:
    """Those that transforms of Albumentations draw from, which has states of its own, also in nested transforms."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.generator, self.python = np.random.Generator(np.random.PCG64()), random.Random()
        for transform in transforms:  # reaches all that are nested in it
            transform.set_random_state(self.generator, self.python)

    def seed(self, seed: int) -> None:
        """Brings them to where this seed, below 2**62, says; ten times as fast as new generators."""
        inner = {"state": seed << 64 | seed, "inc": 2 * seed + 1}
        self.generator.bit_generator.state = {"bit_generator": "PCG64", "state": inner, "has_uint32": 0, "uinteger": 0}
        self.python.seed(seed)


@contextlib.contextmanager
def global_states(seed: int) -> Iterator[None]:
    """Inside the `with`, the random states of Python, NumPy and torch are what the seed says; then, as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Seeded(Dataset):
    """Any map-style Dataset, read by pairs (epoch, index), with a draw of its own for each of them.

    For the length of a read, the random states of Python, NumPy, torch and of the Albumentations transforms that are
    attributes of the Dataset, or of those in it, are what (seed, epoch, index) say.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.states = RandomStates(list(_albumentations_in(dataset)))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        mixed = int(np.random.SeedSequence((self.seed, TRANSFORM, epoch, index)).generate_state(1, np.uint64)[0]) >> 2
        self.states.seed(mixed)
        with global_states(mixed):
            return self.dataset[index]


def _albumentations_in(dataset: object) -> Iterator[Any]:
    """The Albumentations transforms that hang on a Dataset, or on those that it wraps."""
    for value in vars(dataset).values() if hasattr(dataset, "__dict__") else ():
        if isinstance(value, A.BasicTransform | A.BaseCompose):
            yield value
        for part in value if isinstance(value, list | tuple) and len(value) < 100 else [value]:
            if isinstance(part, Dataset):
                yield from _albumentations_in(part)
