"""Transforms and Datasets that users bring: completed, repeatable, and never twice the same by mistake."""

import random

import albumentations as A
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from torch import Tensor
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


def images_of(loader: DataLoader) -> Tensor:
    return torch.cat([images for images, _ in loader])


def ending_with(*end: A.BasicTransform) -> A.Compose:
    return A.Compose([A.HorizontalFlip(p=1), *end])


def scaled(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "transform",
    [
        ending_with(),
        ending_with(A.ToTensorV2()),
        ending_with(A.ToFloat()),
        ending_with(A.Normalize(MEAN, STD)),
        ending_with(*FINISHED),
        A.HorizontalFlip(p=1),
        v1.Compose([v1.RandomHorizontalFlip(1)]),
        v1.Compose([v1.RandomHorizontalFlip(1), v1.ToTensor()]),
        v1.Compose([v1.RandomHorizontalFlip(1), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
        v2.RandomHorizontalFlip(1),
        v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1), v2.ToDtype(torch.float32, scale=True)]),
        v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1), v2.ToDtype(torch.float32)]),
        lambda image: image[:, ::-1],
        lambda image: (scaled(image[:, ::-1]) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1),
    ],
)
def test_what_a_transform_lacks_to_a_normalised_tensor_is_done_afterwards(transform):
    plain, mirrored = CIFAR10(train=False), CIFAR10(train=False, transform=transform)
    for key in (3, (1, 3)):
        image, label = mirrored[key]
        assert (image.dtype, image.shape, label) == (torch.float32, (3, 32, 32), plain[3][1])
        torch.testing.assert_close(image, plain[3][0].flip(2), rtol=0, atol=1e-5)


def test_the_interface_is_that_of_torchvision(tiny_root):
    theirs, ours = datasets.CIFAR10(tiny_root, train=True), CIFAR10(tiny_root, True, None, lambda label: 9 - label)
    np.testing.assert_array_equal(ours.data, theirs.data)
    assert ours.targets == [9 - label for label in theirs.targets]
    assert list(ours.class_to_idx) == list(ours.classes)


def test_without_leave_nothing_is_downloaded(monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT")
    with pytest.raises(RuntimeError, match="it may not be downloaded"):
        CIFAR10("nowhere", download=False)


@pytest.mark.parametrize("transform", [NESTED, v2.Compose([v2.RandomCrop(32, padding=4), v2.ColorJitter(0.5)])])
def test_the_draw_depends_on_seed_epoch_and_image_alone(transform):
    def epochs(workers: int, **options) -> list[Tensor]:
        loader = make_loader(dataset, 50, train=True, workers=workers)
        for name, value in options.items():
            setattr(loader, name, value)
        return [images_of(loader) for _ in range(2)]

    dataset = CIFAR10(transform=transform, seed=3)
    here = epochs(0)
    for other in (epochs(2), epochs(1, multiprocessing_context="spawn")):
        assert all(map(torch.equal, here, other))
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


def wrapped(kind: str, dataset: CIFAR10) -> tuple[Dataset, dict]:
    if kind == "sampler":
        return dataset, {"sampler": WeightedRandomSampler([1.0] * 20, 100)}
    parts = random_split(dataset, [100, 100], generator=torch.Generator().manual_seed(0))
    wraps = {"plain": dataset, "subset": Subset(dataset, range(50)), "split": parts[0], "concat": ConcatDataset(parts)}
    return wraps[kind], {"shuffle": False}


@pytest.mark.parametrize("kind", ["plain", "subset", "split", "concat", "sampler"])
@pytest.mark.parametrize("how", [{"augment": ("crop", "cutout")}, {"transform": NESTED}])
def test_in_a_plain_loader_every_epoch_differs_and_a_seed_repeats_them(kind, how):
    dataset, order = wrapped(kind, CIFAR10(**how))

    def epochs(workers: int) -> list[bytes]:
        torch.manual_seed(7)
        loader = DataLoader(dataset, 25, num_workers=workers, persistent_workers=workers > 0, **order)
        return [image.numpy().tobytes() for _ in range(2) for image in images_of(loader)]

    drawn = epochs(0)
    assert len(set(drawn)) >= len(drawn) - 4  # two draws of an image may meet by chance
    assert epochs(0) == drawn


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers_no_epoch_and_no_worker_repeats_another(persistent):
    dataset = CIFAR10(transform=NESTED)
    dataset.images[:] = dataset.images[0]  # the same picture everywhere: only the draws differ

    def epochs() -> list[bytes]:
        torch.manual_seed(7)
        loader = DataLoader(dataset, 25, shuffle=True, num_workers=2, persistent_workers=persistent)
        return [image.numpy().tobytes() for _ in range(2) for image in images_of(loader)]

    drawn = epochs()
    assert len(set(drawn)) == len(drawn) == 400
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
        return self.transform(image=np.array(image))["image"], label


@pytest.mark.parametrize("part", [False, True])
def test_the_loader_takes_any_dataset_and_repeats_its_draws_with_any_workers(tiny_root, part):
    def epochs(workers: int) -> list[Tensor]:
        dataset = Subset(Theirs(tiny_root), range(60)) if part else Theirs(tiny_root)
        loader = make_loader(dataset, 50, train=True, workers=workers, seed=2)
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
    with pytest.raises(ValueError, match="transform must be callable"):
        CIFAR10(transform="flip")
    with pytest.raises(TypeError, match="slice"):
        dataset[0:3]


@pytest.mark.parametrize("transform", [lambda image: image[..., 0], lambda image: None, lambda image: image.tolist()])
def test_a_transform_that_returns_no_image_is_refused_in_a_sentence(transform):
    with pytest.raises(ValueError, match="transform must return an image of three channels"):
        CIFAR10(transform=transform)[0]
