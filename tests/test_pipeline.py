"""Transforms and Datasets that users bring: completed, repeatable, and never twice the same by mistake."""

import random
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, WeightedRandomSampler, random_split
from torchvision import datasets
from torchvision.transforms import v2

from dataset import CIFAR10, MEAN, STD, make_loader

NESTED = A.Compose(
    [
        A.OneOf([A.HorizontalFlip(p=1), A.SomeOf([A.VerticalFlip(p=1), A.Transpose(p=1)], n=1, p=1)], p=0.5),
        A.Sequential([A.Affine(translate_percent=(-0.2, 0.2), p=1), A.GaussNoise(p=1)], p=1),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(4, 8), hole_width_range=(4, 8)),
    ]
)
FINISHED = [A.Normalize(MEAN, STD), A.ToTensorV2()]


def images_of(loader: Any) -> Tensor:
    return torch.cat([images for images, _ in loader])


def ending_with(*end: A.BasicTransform) -> A.Compose:
    return A.Compose([A.HorizontalFlip(p=1), *end])


class Mine(v2.Compose): ...


FLIP, AS_FLOAT = v2.RandomHorizontalFlip(1), [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
AS_UINT8 = [  # mirrored by each kind of transform, and then normalised
    ending_with(),
    ending_with(A.ToTensorV2()),
    A.HorizontalFlip(p=1),
    v1.Compose([v1.RandomHorizontalFlip(1)]),
    FLIP,
    nn.Sequential(FLIP, v2.ToImage()),
    Mine([FLIP]),
    lambda image: image[:, ::-1],
    lambda image: torch.from_numpy(image[:, ::-1].copy()).permute(2, 0, 1),
]
AS_FLOATS = [  # mirrored, on the scale 0-1, and then left alone
    ending_with(A.ToFloat(), A.ToTensorV2()),
    v1.Compose([v1.RandomHorizontalFlip(1), v1.ToTensor()]),
    nn.Sequential(FLIP, *AS_FLOAT),
    Mine([FLIP, *AS_FLOAT]),
    lambda image: image[:, ::-1].astype(np.float64) / 255,
]


@pytest.mark.parametrize("transform", AS_UINT8)
def test_what_a_transform_returns_as_uint8_is_normalised(transform):
    plain, mirrored = CIFAR10(train=False), CIFAR10(train=False, transform=transform)
    for key in (3, (1, 3)):
        image, label = mirrored[key]
        assert type(image) is Tensor
        assert torch.equal(image, plain[3][0].flip(2))
        assert label == plain[3][1]


@pytest.mark.parametrize("transform", AS_FLOATS)
def test_what_a_transform_returns_as_float_is_left_alone(transform):
    dataset = CIFAR10(train=False, transform=transform)
    image, _ = dataset[3]
    assert (type(image), image.dtype) == (Tensor, torch.float32)
    torch.testing.assert_close(image, dataset.images[3].flip(1).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)


def test_each_set_has_a_transform_of_its_own():
    transform = A.Compose([A.HorizontalFlip(p=0.5), A.Affine(rotate=(-30, 30), p=1)])
    dataset = CIFAR10(transform=transform)
    first = dataset[3, 7][0]
    CIFAR10(train=False, transform=transform), dataset.subset([1])
    assert torch.equal(dataset[3, 7][0], first)


def test_the_interface_is_that_of_torchvision(tiny_root):
    theirs, ours = datasets.CIFAR10(tiny_root, train=True), CIFAR10(tiny_root, True, None, lambda label: 9 - label)
    np.testing.assert_array_equal(ours.data, theirs.data)
    assert list(ours.targets) == [9 - label for label in theirs.targets]
    assert list(ours.class_to_idx) == list(ours.classes)


def test_without_leave_nothing_is_downloaded(monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT")
    with pytest.raises(RuntimeError, match="it may not be downloaded"):
        CIFAR10("nowhere", download=False)


V2 = v2.Compose([v2.RandomCrop(32, padding=4), v2.ColorJitter(0.5)])


@pytest.mark.parametrize(("transform", "context", "workers"), [(NESTED, "spawn", 1), (V2, "fork", 2)])
def test_the_draw_depends_on_seed_epoch_and_image_alone(transform, context, workers):
    dataset = CIFAR10(transform=transform, seed=3).subset(range(60))
    here, there = (make_loader(dataset, 20, train=True, workers=count) for count in (0, workers))
    there.multiprocessing_context = context
    assert all(torch.equal(images_of(here), images_of(there)) for _ in range(2))
    one = [dataset[epoch, 5][0] for epoch in range(4)]
    assert len({image.numpy().tobytes() for image in one}) == 4
    dataset.seed = 4
    assert not torch.equal(dataset[0, 5][0], one[0])


def test_global_random_states_are_put_back_after_a_draw():
    def drawn(image: np.ndarray) -> np.ndarray:
        return np.roll(image, (random.randrange(32), np.random.randint(32), int(torch.randint(3, ()))), (0, 1, 2))

    dataset = CIFAR10(transform=drawn)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = dataset[1, 0][0]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(dataset[1, 0][0], first)
    assert not torch.equal(dataset[2, 0][0], first)


@pytest.mark.parametrize(
    ("kind", "workers", "persistent"),
    [("plain", 0, False), ("concat", 0, False), ("sampler", 2, False), ("plain", 2, True)],
)
def test_in_a_plain_loader_no_epoch_and_no_worker_repeats_another_and_a_seed_repeats_them(kind, workers, persistent):
    part = CIFAR10(transform=NESTED).subset(range(50))
    part.images[:] = part.images[0]  # the same picture everywhere: only the draws differ
    dataset = ConcatDataset(random_split(part, [25, 25])) if kind == "concat" else part
    order: dict = {"sampler": WeightedRandomSampler([1.0] * 20, 50)} if kind == "sampler" else {"shuffle": True}

    def epochs() -> list[bytes]:
        torch.manual_seed(7)
        loader = DataLoader(dataset, 25, num_workers=workers, persistent_workers=persistent, **order)
        return [image.numpy().tobytes() for _ in range(2) for image in images_of(loader)]

    drawn = epochs()
    assert len(set(drawn)) == len(drawn) == 100
    assert epochs() == drawn


class Theirs(Dataset):
    """As the notebooks of others have it: torchvision's data, and Albumentations in `__getitem__`."""

    def __init__(self, root) -> None:
        self.data = datasets.CIFAR10(root)
        self.transform = A.Compose([NESTED, *FINISHED])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        self.transform.set_random_seed(int(torch.randint(2**31, ())))
        return self.transform(image=np.array(image))["image"], label


def test_the_loader_takes_any_dataset_and_repeats_its_draws_with_any_workers(tiny_root):
    def epochs(workers: int) -> list[Tensor]:
        loader = make_loader(Subset(Theirs(tiny_root), range(60)), 50, train=True, workers=workers, seed=2)
        return [images_of(loader) for _ in range(2)]

    first, second = epochs(0)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, (first, second), epochs(2)))


def test_what_is_assigned_works_or_is_refused():
    dataset = CIFAR10()
    dataset.transform = A.HorizontalFlip(p=1)
    torch.testing.assert_close(dataset[0][0], CIFAR10()[0][0].flip(2))
    with pytest.raises(ValueError, match="augment and transform"):
        dataset.augment = ("flip",)
    dataset.transform = None
    dataset.augment = ("flip",)
    with pytest.raises(ValueError, match="crop, flip, affine"):
        dataset.augment = A.Compose([A.HorizontalFlip(p=0.5)])
    with pytest.raises(TypeError, match="slice"):
        dataset[0:3]


@pytest.mark.parametrize(
    "transform", [lambda image: image[..., 0], lambda image: None, lambda image: image.astype(int)]
)
def test_a_transform_that_returns_no_image_is_refused_in_a_sentence(transform):
    with pytest.raises(ValueError, match="transform must return"):
        CIFAR10(transform=transform)[0]
