"""What chance decides, pinned: draws, orders, augmented images and batches stay as they are, bit for bit.

A run that is resumed, and the figures on the pages, rest on these; none of them depends on the processor.
"""

import hashlib

import numpy as np
import pytest
import torch

from dataset import CIFAR10, make_loader, train_transform
from machinery.data.augment import EpochSampler, draws_of, seeds_of
from machinery.data.cifar10 import SYNTHETIC_COUNTS

AUGMENTED = {  # uint8 images of 40 synthetic ones
    "crop": "ac1d0058711d52d0",
    "flip": "70c05fd4e914f5e9",
    "affine": "beb6fdf1ee3b1e56",
    "trivial": "5af885832fe14397",
    "cutout": "9ca37ec45a3ebd6f",
    "corrupt": "fecc05f0876689d0",
}
BATCHES = {
    ("crop", "flip", "cutout"): "7274cd8a68a19d1d",
    ("crop", "affine", "trivial"): "2d0bb0fdb30bd5a5",
}  # two epochs, normalised


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def test_draws():
    assert draws_of(3, 5, 100).dtype == np.float64
    assert digest(draws_of(3, 5, 100)) == "50cf01f9dcee12f1"
    assert digest(seeds_of(3, 5, 100)) == "e416d02cae73be6f"


def test_orders():
    sampler = EpochSampler(1000, seed=7, skip=0.5, epochs=4)
    sampler.losses = torch.arange(1000.0) % 37
    assert digest(*(sampler.order(epoch) for epoch in range(4))) == "56bbb6598fca4e7d"


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmented_images(name):
    images = CIFAR10(data="synthetic", train=False).data[:40]
    changed = train_transform((name,))(images=images, draws=draws_of(1, 2, 40))["images"]
    assert changed.dtype == np.uint8
    assert digest(changed) == AUGMENTED[name]


@pytest.mark.parametrize("augment", BATCHES)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches(augment, workers, monkeypatch):
    monkeypatch.setitem(SYNTHETIC_COUNTS, True, 90)
    loader = make_loader(CIFAR10(data="synthetic", augment=augment, seed=4), 40, train=True, workers=workers)
    seen = [part for _ in range(2) for images, labels in loader for part in (images.numpy(), labels.numpy())]
    assert [len(part) for part in seen[::2]] == [40, 40, 10] * 2
    assert digest(*seen) == BATCHES[augment]
